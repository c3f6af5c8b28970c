"""A model of ours as a model of EleutherAI's evaluation harness (extra [eval]), and the tasks of a local folder."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.errors import UserError
from k2jax.inference.generate import continue_tokens
from k2jax.inference.load import LoadedModel
from k2jax.inference.mesh import DATA_AXES, padded_to
from k2jax.model.transformer import build_model
from k2jax.sharding.place import place, whole
from k2jax.sharding.rules import AXES_OF
from k2jax.train.compiling import compiled_when_called
from k2jax.train.phases import rope_after


def _padded_length(length: int, window: int) -> int:
    """Few lengths, so that few programs are compiled."""
    return min(window, 1 << max(length - 1, 0).bit_length())


def _score(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target, and whether it is the greedy choice: the first of the ids with the largest logit.

    By masks, so that each device looks at its own ids alone where `tensor` cuts V.
    """
    id_V = jnp.arange(logits_BTV.shape[-1])
    chosen_BT = jnp.where(id_V == targets_BT[..., None], logits_BTV, 0).sum(-1)
    is_largest_BTV = logits_BTV == logits_BTV.max(-1, keepdims=True)
    first_BT = jnp.where(is_largest_BTV, id_V, logits_BTV.shape[-1]).min(-1)
    return chosen_BT - jax.nn.logsumexp(logits_BTV, -1), first_BT == targets_BT


class Scorer:
    """Log-probabilities of tokens, in batches.

    On a mesh rows are added to a batch, and positions to its rows, until the axes that cut them divide their number.
    """

    def __init__(self, loaded: LoadedModel, batch: int):
        config, self._window, self._loaded = loaded.config, loaded.context_length, loaded
        self._batch = padded_to(loaded.mesh, DATA_AXES, batch)
        self._values = loaded.state.params, loaded.state.router_bias
        rope = rope_after(config, int(loaded.state.step))

        @jax.jit
        def score(values, tokens_BT, targets_BT):
            dtype = jnp.dtype(config.train.compute_dtype)
            logits_BTV = build_model(config.model, *values, dtype, rope=rope, kernels=config.kernels)(tokens_BT).logits
            return jax.tree.map(whole, _score(logits_BTV, place(targets_BT, "BS")))

        self._score = compiled_when_called(score)

    def __call__(self, rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the greedy one) for rows of (context, continuation).

        At most window + 1 tokens a row, the context not empty.
        """
        results = []
        for start in range(0, len(rows), self._batch):
            part = rows[start : start + self._batch]
            length = _padded_length(max(len(c) + len(t) for c, t in part) - 1, self._window)
            length = padded_to(self._loaded.mesh, AXES_OF["T"], length)
            padded = np.zeros((2, self._batch, length), np.int32)
            for row, (context, continuation) in enumerate(part):
                tokens = [*context, *continuation]
                padded[:, row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
            with self._loaded.on_mesh():
                logprob_BT, greedy_BT = map(np.asarray, self._score(self._values, *padded))
            for row, (context, continuation) in enumerate(part):
                span = slice(len(context) - 1, len(context) + len(continuation) - 1)
                results.append((float(logprob_BT[row, span].sum()), bool(greedy_BT[row, span].all())))
        return results


def harness_model(loaded: LoadedModel, batch: int = 16):
    """An `lm_eval` LM. `.shortened` counts the requests whose beginning did not fit the window."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokenizer, window, scorer = loaded.need_tokenizer(), loaded.context_length, Scorer(loaded, batch)

    class K2Model(TemplateLM):
        shortened = 0
        eot_token_id = tokenizer.eos
        prefix_token_id = tokenizer.bos
        tokenizer_name = tokenizer.digest

        def tok_encode(self, string: str, **kwargs) -> list[int]:
            return [int(i) for i in tokenizer.encode(string)]

        def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
            rows = []
            for _, context, continuation in requests:
                context = context if context[:1] == [tokenizer.bos] else [tokenizer.bos, *context]
                room = max(window + 1 - len(continuation), 1)
                self.shortened += len(context) > room or len(continuation) > window
                rows.append((context[-room:], continuation[-window:]))
            return scorer(rows)

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in requests:
                windows = get_rolling_token_windows(
                    self.tok_encode(request.args[0]), tokenizer.bos, max_seq_len=window, context_len=1
                )
                totals.append(sum(value for value, _ in scorer([make_disjoint_window(w) for w in windows])))
            return totals

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            texts = []
            for request in requests:
                prompt, options = request.args
                until = options.get("until") or []
                until = [until] if isinstance(until, str) else until
                context = [tokenizer.bos, *self.tok_encode(prompt)]
                temperature = float(options.get("temperature") or 0) if options.get("do_sample") else 0.0
                num_tokens = int(options.get("max_gen_toks", 256))
                self.shortened += len(context) > window
                ids = continue_tokens(loaded, [context], num_tokens, temperature, 0, tokenizer.stops)[0]
                text = tokenizer.decode(ids)
                for stop in until:
                    text = text.split(stop)[0] if stop else text
                texts.append(text)
            return texts

    return K2Model()


def run_tasks(loaded: LoadedModel, tasks: list[str], folder: str | None, limit: int | None) -> tuple[dict, int]:
    """({task: {metric: value}}, requests shortened). folder: where the tasks' YAML files lie, beside the harness's own.

    Raises UserError if lm-eval is not installed or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("--tasks: needs the evaluation harness: pip install lm-eval") from None
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--task-folder {folder}: no such folder")
    manager = TaskManager(include_path=folder)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(*(f"--tasks {task}: the harness knows no such task" for task in unknown))
    model = harness_model(loaded)
    results = simple_evaluate(model, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0)
    return results["results"], model.shortened
