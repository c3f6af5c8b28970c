"""Config: every violation at once, in words that name the fields; JSON there and back."""

import dataclasses
import json

import numpy as np
import pytest

from k2jax.cli.overrides import print_fields
from k2jax.config import (
    Config,
    Free,
    ModelConfig,
    OptimConfig,
    OrZero,
    RopeConfig,
    TrainConfig,
    differences,
    field_rules,
    field_types,
    flatten,
)
from k2jax.errors import UserError


def error_of(function):
    with pytest.raises(UserError) as error:
        function()
    return str(error.value)


def test_defaults_are_valid():
    assert Config().validate() == Config()


def test_all_violations_at_once():
    """The golden text; where a message is improved, improve it here too."""
    config = Config().replace(
        {
            "model.num_hidden_layers": 1.5,
            "model.hidden_size": 100,
            "model.num_experts_per_tok": 400,
            "model.qk_rope_head_dim": 7,
            "guard.window": 1,
            "optim.momentum": 1.0,
            "optim.weight_decay": -0.1,
            "optim.max_grad_norm": 0.0,
            "optim.ns_dtype": "float16",
            "optim.nesterov": 1,
            "optim.learning_rate": float("nan"),
            "optim.adam_b2": True,
            "optim.warmup_tokens": 20_000_000_000_000,
            "mesh.fsdp": 8,
            "mesh.expert": 5,
            "train.num_microbatches": 3,
            "train.eval_every": 0,
            "data.seed": True,
        }
    )
    assert error_of(config.validate) == "\n".join(
        [
            "model.num_hidden_layers = 1.5: must be an integer",
            "optim.learning_rate = nan: must be a finite number",
            "optim.weight_decay = -0.1: must be at least 0",
            "optim.max_grad_norm = 0.0: must be greater than 0",
            "optim.momentum = 1.0: must be below 1",
            "optim.nesterov = 1: must be True or False",
            "optim.ns_dtype = 'float16': must be one of 'bfloat16', 'float32'",
            "optim.adam_b2 = True: must be a finite number",
            "guard.window = 1: must be at least 2, since one step has no deviation",
            "data.seed = True: must be an integer",
            "train.eval_every = 0: must be greater than 0",
            "model.n_routed_experts = 384: must be a multiple of mesh.expert = 5; nearest: 380 or 385",
            "model.hidden_size = 100: must be a multiple of mesh.fsdp = 8; nearest: 96 or 104",
            "model.qk_rope_head_dim = 7: must be a multiple of 2 = 2; nearest: 6 or 8",
            "data.batch_sequences = 16384: must be a multiple of train.num_microbatches * mesh.replica * mesh.fsdp"
            " * mesh.expert = 120; nearest: 16320 or 16440",
            "train.eval_sequences = 256: must be a multiple of mesh.replica * mesh.stage * mesh.fsdp * mesh.expert = 40;"
            " nearest: 240 or 280",
            "model.num_experts_per_tok = 400: must be at most model.n_routed_experts = 384",
            "optim.warmup_tokens = 20000000000000: must be at most optim.constant_until_tokens = 10000000000000",
        ]
    )


def test_stages_share_the_moe_layers_out():
    """60 of K2's do not go into 16; stages need whole groups of microbatches, and go with fsdp and expert alone."""
    mesh = {"mesh.stage": 16, "mesh.tensor": 2, "mesh.context": 2}
    config = Config().replace(mesh | {"train.num_microbatches": 24, "data.batch_sequences": 24_000})
    assert error_of(config.validate) == "\n".join(
        [
            "train.num_microbatches = 24: must be a multiple of mesh.stage = 16; nearest: 16 or 32",
            "mesh.stage = 16: must divide the 60 MoE layers, of which each stage has as many; nearest: 15 or 20",
            "mesh.tensor = 2: must be 1 with mesh.stage = 16; use fsdp or expert",
            "mesh.context = 2: must be 1 with mesh.stage = 16; use fsdp or expert",
        ]
    )
    message = error_of(Config().replace({"mesh.stage": 64, "train.num_microbatches": 64}).validate)
    assert message == "mesh.stage = 64: must divide the 60 MoE layers, of which each stage has as many; nearest: 60"
    dense = {"mesh.stage": 2, "train.num_microbatches": 2, "model.first_k_dense_replace": 61}
    message = error_of(Config().replace(dense).validate)
    assert message == "mesh.stage = 2: must divide the 0 MoE layers, of which each stage has as many; nearest: 1"
    counts = {"mesh.stage": 4, "train.num_microbatches": 8, "train.microbatches_together": 6}
    assert error_of(Config().replace(counts).validate) == "\n".join(
        [
            "train.num_microbatches = 8: must be a multiple of train.microbatches_together = 6; nearest: 6 or 12",
            "train.microbatches_together = 6: must be a multiple of mesh.stage = 4; nearest: 4 or 8",
        ]
    )
    message = error_of(Config().replace({"train.microbatches_together": 1}).validate)
    assert message == "train.microbatches_together = 1: must be None without pipeline stages (mesh.stage = 1)"
    rows = {"train.num_microbatches": 15, "data.batch_sequences": 15 * 1024, "train.eval_sequences": 240}
    Config().replace({"mesh.stage": 15, "mesh.expert": 16} | rows).validate()


def test_off_is_none_only_where_it_may_be():
    Config().replace({"optim.max_grad_norm": None, "optim.qk_clip_tau": None, "train.eval_every": None}).validate()
    message = error_of(Config().replace({"optim.momentum": None, "train.num_steps": None}).validate)
    assert message == "optim.momentum = None: must be a finite number\ntrain.num_steps = None: must be an integer"


def test_a_buffer_holds_at_least_the_balanced_load():
    assert error_of(Config().replace({"kernels.expert_buffer": 0.5}).validate) == (
        "kernels.expert_buffer = 0.5: must be at least 1, the balanced load, or None for no bound; nearest: 1.0"
    )
    Config().replace({"kernels.expert_buffer": 1}).validate()


def test_json_round_trip():
    changes = {"model.rope.rope_theta": 10_000, "optim.qk_clip_tau": None, "mesh.expert": 4, "train.run_dir": "a/b"}
    config = Config().replace(changes)
    values = json.loads(json.dumps(config.to_json()))
    assert Config.from_json("x", values) == config
    assert values["mesh"]["expert"] == 4
    assert differences(Config(), config) == {
        "model.rope.rope_theta": (50_000.0, 10_000),
        "optim.qk_clip_tau": (100.0, None),
        "mesh.expert": (1, 4),
        "train.run_dir": ("runs/k2", "a/b"),
    }


def test_json_with_unknown_and_missing_fields():
    values = dataclasses.asdict(Config())
    values["optim"]["learning_rat"] = values["optim"].pop("learning_rate")
    values["zebra"] = {"stripes": 2}
    assert error_of(lambda: Config.from_json("x", values)) == (
        "optim.learning_rat: no such field; did you mean optim.learning_rate or optim.final_learning_rate?\n"
        "zebra.stripes: no such field; sections are model, optim, guard, phases, kernels, data, mixture, mesh, train, "
        "checkpoint, watchdog\n"
        "optim.learning_rate: is missing"
    )


def test_a_section_of_another_type():
    """A dict is answered with the call to write, also of sections in it; all at once, also where one replaces."""
    rope = {"model": {"hidden_size": 64, "rope": {"factor": None}}, "train": None}
    whole = Config()
    for refused in (lambda: Config(**rope), lambda: whole.replace(rope), lambda: dataclasses.replace(whole, **rope)):
        assert error_of(refused).split("\n") == [
            "model = {'hidden_size': 64, 'rope': {'factor': None}}: must be a ModelConfig; "
            "write ModelConfig(hidden_size=64, rope=RopeConfig(factor=None))",
            "train = None: must be a TrainConfig; write TrainConfig(run_dir='runs/k2'), say",
        ]
    assert eval("ModelConfig(hidden_size=64, rope=RopeConfig(factor=None))").rope == RopeConfig(factor=None)
    for value in (3, RopeConfig, {4: 5}, OptimConfig()):
        inner = f"model.rope = {value!r}: must be a RopeConfig; write RopeConfig(rope_theta=50000.0), say"
        assert error_of(lambda: ModelConfig(rope=value)) == inner  # noqa: B023
        assert error_of(lambda: Config().replace({"model.rope": value})) == inner  # noqa: B023
    assert error_of(lambda: MyConfig(train=TrainConfig())).startswith("train = TrainConfig(run_dir='runs/k2', ")
    assert error_of(lambda: MyConfig(train=TrainConfig())).endswith(
        "must be a MyTrainConfig; write MyTrainConfig(run_dir='runs/k2'), say"
    )


def test_fields_that_are_not_there_are_not_replaced():
    changes = {"train.num_step": 3, "modl": 1, "train.seed.x": 2, "train.seed": 1, "zebra.stripes": 2}
    sections = "sections are model, optim, guard, phases, kernels, data, mixture, mesh, train, checkpoint, watchdog"
    assert error_of(lambda: Config().replace(changes)).split("\n") == [
        "train.num_step: no such field; did you mean train.num_steps?",
        "modl: no such field; did you mean model?",
        "train.seed.x: no such field; did you mean train.seed?",
        f"zebra.stripes: no such field; {sections}",
    ]
    both = {"model.rope.factor": 2.0, "model": ModelConfig(hidden_size=64), "model.rope": RopeConfig(rope_theta=1.0)}
    model = Config().replace(both).model
    assert (model.hidden_size, model.rope.factor, model.rope.rope_theta) == (64, 2.0, 1.0)
    assert MyConfig().replace({"train.warm_restarts": 5}).train.warm_restarts == 5


def test_a_section_where_a_field_is_due():
    values = dataclasses.asdict(Config())
    values["model"]["rope"] = 3
    assert error_of(lambda: Config.from_json("x", values)).startswith(
        "model.rope: is a section; give its fields, such as model.rope.rope_theta\nmodel.rope.rope_theta: is missing\n"
    )
    config = Config().replace({"model.hidden_size": {"a": 1}, "optim.learning_rate": RopeConfig()})
    assert error_of(config.validate).split("\n") == [
        "model.hidden_size = {'a': 1}: must be an integer",
        f"optim.learning_rate = {RopeConfig()!r}: must be a finite number",
    ]


def test_numbers_too_large_for_their_type():
    huge = 10**400
    config = Config().replace(
        {
            "optim.learning_rate": huge,
            "optim.momentum": -huge,
            "phases.balance_alpha": (0.1, huge),
            "optim.weight_decay": np.float64(-1),
            "model.hidden_size": 7 * huge,
            "train.num_steps": 2**63,
            "train.num_microbatches": 10**5000,
        }
    )
    assert error_of(config.validate).split("\n") == [
        f"model.hidden_size = {7 * huge}: must be below 2**63, as in 64 bits",
        f"optim.learning_rate = {huge}: must be a finite number",
        f"optim.weight_decay = {np.float64(-1)!r}: must be at least 0",
        f"optim.momentum = {-huge}: must be a finite number",
        f"phases.balance_alpha = (0.1, {huge}): must be a list, each a finite number",
        f"train.num_steps = {2**63}: must be below 2**63, as in 64 bits",
        "train.num_microbatches = an integer of more than 4300 digits: must be below 2**63, as in 64 bits",
    ]
    Config().replace({"train.num_steps": 2**63 - 1, "optim.adam_eps": 1}).validate()


@pytest.mark.parametrize("value", [[], 3, None, {"model": 3}, {"model": [1]}])
def test_values_that_are_not_a_config(value):
    """A message and not a traceback, whatever the file holds."""
    rule = "must be an object whose values, the sections, are objects"
    assert error_of(lambda: Config.from_json("config.json", value)) == f"config.json: {rule}"


def test_ill_typed_json_names_the_fields():
    values = dataclasses.asdict(Config())
    values["model"]["hidden_size"], values["data"]["path"] = "7168", 3
    assert error_of(lambda: Config.from_json("x", values)) == (
        "model.hidden_size = '7168': must be an integer\ndata.path = 3: must be text"
    )


def test_sections_stay_small():
    """Rule 8 of the style: under 25 fields a section."""
    sections = [name.rsplit(".", 1)[0] for name in field_types()]
    assert all(sections.count(section) < 25 for section in sections)
    assert len(sections) == len(field_types()) > 50


def test_mixture_and_data_rules():
    config = Config().replace(
        {
            "mixture.weights": ("web=3 code=1", "web=0", "web:3", "natural"),
            "mixture.epochs": "web=0 wiki=2",
            "data.fim_rate": 0.1,
            "data.skip_steps": ("7-5", "10-19", "15-30"),
            "model.vocab_size": 500,
        }
    )
    assert error_of(config.validate).split("\n") == [
        "mixture.weights = ('web=3 code=1', 'web=0', 'web:3', 'natural'): has 4 entries, must have 1 or 2, one per phase, as "
        "phases.start_tokens has",
        "mixture.weights: 'web=0' adds up to 0, must be 1 to 1,000,000",
        "mixture.weights: 'web:3' must be pairs source=integer with spaces between, such as 'web=70 code=30', or 'natural'",
        "mixture.epochs = 'web=0 wiki=2': must be at least 1 of each source; a weight of 0 leaves it out",
        "data.fim_rate, data.fim_tokens: must be given together, or neither",
        "data.skip_steps: '7-5' must be FIRST-LAST, two steps that rise, such as '1200-1219'",
        "data.skip_steps: 15-30 must come after 10-19, and not meet it",
    ]
    config = Config().replace({"data.fim_rate": 0.1, "data.fim_tokens": (1, 1, 999), "model.vocab_size": 500})
    assert error_of(config.validate).split("\n") == [
        "data.fim_tokens = (1, 1, 999): must be three different ids, before prefix, suffix and middle",
        "data.fim_tokens: 999 must be below model.vocab_size = 500",
    ]
    one = {
        name: value[:1] for name, value in flatten(dataclasses.asdict(Config())).items() if name.startswith("phases.")
    }
    config = Config().replace(one | {"mixture.weights": ("a=1", "b=1")})
    assert "has 2 entries, must have 1, one per" in error_of(config.validate)
    good = {
        "mixture.weights": ("a=1", "natural"),
        "data.fim_rate": 0.1,
        "data.fim_tokens": (0, 1, 2),
        "data.skip_steps": ("3-3",),
    }
    assert Config.from_json("x", Config().replace(good).to_json()) == Config().replace(good)


def test_a_url_where_a_folder_is_written_to():
    """It would become a folder called gs: in the current one."""
    fields = ("data.index_dir", "train.compile_cache")
    rule = "must be a folder, not a URL; copy it there when the run is done, or mount the bucket"
    assert error_of(Config().replace(dict.fromkeys(fields, "gs://bucket/x")).validate).split("\n") == [
        f"{name} = 'gs://bucket/x': {rule}" for name in fields
    ]
    urls = {"data.path": "gs://bucket/store", "train.run_dir": "gs://bucket/run", "train.init_from": "s3://bucket/run"}
    Config().replace(urls | {"train.compile_cache": None}).validate()


def test_phases_are_columns_of_one_length():
    config = Config().replace(
        {
            "phases.start_tokens": (5, 100, 100),
            "phases.rope": ("plain", "yarn", "plain"),
            "phases.router_bias_rate": (0.1,),
            "phases.balance_alpha": (0.1, -0.1, 0.0),
            "model.rope.factor": None,
        }
    )
    assert error_of(config.validate) == "\n".join(
        [
            "phases.balance_alpha = (0.1, -0.1, 0.0): must be at least 0",
            "phases.router_bias_rate = (0.1,): has 1 value, must have 3, one per phase, as phases.start_tokens has",
            "phases.start_tokens = (5, 100, 100): must begin with 0 and rise; nearest: (0, 5, 100)",
            "phases.rope: 'yarn' needs model.rope.factor, which is None; give the factor or use 'plain'",
        ]
    )
    assert error_of(Config().replace({"phases.rope": ("plain", "ntk")}).validate).startswith(
        "phases.rope = ('plain', 'ntk'): must be a list, each one of 'plain', 'yarn'"
    )
    assert error_of(Config().replace({"phases.rope": ()}).validate).startswith("phases.rope = (): must be a list")


@pytest.mark.parametrize(
    ("experts", "groups", "used", "chosen", "problem"),
    [
        (12, 5, 2, 2, "model.n_routed_experts = 12: must be a multiple of model.n_group = 5; nearest: 10 or 15"),
        (12, 12, 2, 2, "model.n_group = 12: a group's score is the sum of its best two experts; at most 6"),
        (12, 3, 4, 2, "model.topk_group = 4: must be at most model.n_group = 3"),
        (
            12, 3, 1, 5,
            "model.num_experts_per_tok = 5: model.topk_group = 1 groups of 4 experts hold 4; at most that, or a "
            "model.topk_group of at least 2",
        ),
    ],
)  # fmt: skip
def test_groups_hold_the_experts_of_a_token(experts, groups, used, chosen, problem):
    config = Config().replace(
        {
            "model.n_routed_experts": experts,
            "model.n_group": groups,
            "model.topk_group": used,
            "model.num_experts_per_tok": chosen,
        }
    )
    assert error_of(config.validate) == problem


@dataclasses.dataclass(frozen=True)
class MyTrainConfig(TrainConfig):
    warm_restarts: Free[OrZero[int]] = 2  # times that the rate is warmed up again
    plain: int = 1


@dataclasses.dataclass(frozen=True)
class MyConfig(Config):
    train: MyTrainConfig = dataclasses.field(default_factory=MyTrainConfig)


def test_a_field_is_declared_once(capsys):
    """A field of a derived section: its bounds, its resume rule and its help stand beside its type, and work."""
    assert "train.warm_restarts" in field_types(MyConfig) and "train.warm_restarts" not in field_types()
    rules = field_rules(MyConfig)
    assert rules["train.warm_restarts"].resume and not rules["train.plain"].resume and rules["mesh.fsdp"].resume
    changed = {"train.warm_restarts": -1, "train.plain": 0, "train.seed": 2**32}
    assert MyConfig().replace(changed).problems() == [
        "train.seed = 4294967296: must be below 4294967296",
        "train.warm_restarts = -1: must be at least 0",
        "train.plain = 0: must be greater than 0",
    ]
    assert MyConfig().replace({"train.warm_restarts": 0}).problems() == []
    print_fields(MyConfig(), "k2jax train")
    text = " ".join(capsys.readouterr().out.split())
    assert "--train.warm-restarts INT" in text and "times that the rate is warmed up again" in text


def test_what_a_resumed_run_may_change():
    """The list as it was before the rules stood at the fields."""
    free = {name for name, rule in field_rules().items() if rule.resume}
    assert {name.split(".")[0] for name in free} == {
        "mesh",
        "kernels",
        "checkpoint",
        "mixture",
        "train",
        "data",
        "guard",
        "watchdog",
    }
    assert {n for n in free if n.startswith(("train.", "data.", "guard."))} == {
        "train.run_dir", "data.path", "data.validation_path", "data.read_threads", "data.prefetch_sequences",
        "data.index_dir", "data.skip_steps", "data.max_bad_rows", "train.num_steps", "guard.loss_zscore",
        "guard.grad_norm_zscore", "guard.max_skips", "guard.compare_every", "train.log_every", "train.eval_every", "train.eval_sequences",
        "train.remat", "train.self_check", "train.compile_cache", "train.num_microbatches",
        "train.microbatches_together", "train.log_ranks", "train.replay_bound",
    }  # fmt: skip
