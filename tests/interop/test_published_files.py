"""Small files of published folders as others write them: odd but meant, and what cannot be meant."""

import base64
import dataclasses
import json
import random

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from tiny_published import SHAPES, draw_tensors, write_checkpoint

from k2jax.data.saved_tokenizer import open_tokenizer, save_tokenizer
from k2jax.data.tokenizer import load_tokenizer, train_bpe
from k2jax.errors import UserError
from k2jax.interop.hf import load_values, open_published
from k2jax.interop.hf_config import _COPIED, _KNOWN, _OPTIONAL, misspelled
from k2jax.interop.published import SCALE, whole_value
from k2jax.interop.published_tokenizer import published_tokenizer
from k2jax.interop.safetensor_files import DTYPES, NewTensor, write_tensors
from k2jax.interop.tokenizer_files import tokenizer_files

K2 = SHAPES["k2"]
YARN = {k: v for k, v in K2["rope_scaling"].items() if k != "type"}
THETA = K2["rope_theta"]


@pytest.fixture(scope="module")
def tensors():
    return draw_tensors(K2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tensors):
    return write_checkpoint(tmp_path_factory.mktemp("published") / "hf", K2, tensors)


def with_config(folder, tmp_path, changes, drop=()):
    """A copy of the folder, made of links to its tensors, with another config.json."""
    copy = tmp_path / "copy"
    copy.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name != "config.json" and not (copy / path.name).exists():
            (copy / path.name).hardlink_to(path)
    values = {k: v for k, v in (json.loads((folder / "config.json").read_text()) | changes).items() if k not in drop}
    (copy / "config.json").write_text(json.dumps(values))
    return copy


@pytest.mark.parametrize(
    ("changes", "drop", "rope"),
    [({"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}, (), "yarn"),
     ({"rope_parameters": {"rope_theta": THETA}}, (), "yarn"),
     ({"rope_parameters": {"rope_type": "yarn", **YARN}}, ("rope_scaling",), "yarn"),
     ({"rope_parameters": {"rope_type": "yarn", **YARN, "partial_rotary_factor": 1.0}}, (), "yarn"),
     ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1}}, ("rope_scaling",), "plain"),
     ({"rope_scaling": None}, (), "plain")],
)  # fmt: skip
def test_rope_wherever_it_stands(folder, tmp_path, changes, drop, rope):
    found, usual = open_published(with_config(folder, tmp_path, changes, drop)), open_published(folder)
    assert found.rope == rope and usual.rope == "yarn"
    assert rope == "plain" or found.model == usual.model


@pytest.mark.parametrize(
    ("changes", "drop", "rule"),
    [({"rope_scaling": {**YARN, "type": "yarn", "rope_type": "default"}}, (), "rope_scaling says rope_type = "),
     ({"rope_scaling": YARN}, (), "rope_scaling has no type"),
     ({"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "yarn", **YARN}}, (), "must agree"),
     ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ("rope_scaling",),
      "partial_rotary_factor = 0.5 of the rope scaling: k2jax has no form for it"),
     ({"rope_parameters": {"rope_theta": 1.0}}, (), "rope_parameters has rope_theta = 1.0, config.json has 50000.0"),
     ({"rope_scaling": [1]}, (), "rope_scaling = \\[1\\]: must be an object"),
     ({"rope_scaling": {"type": [], "factor": 2}}, (), "rope type \\[\\]: must be 'yarn' or 'default'")],
)  # fmt: skip
def test_rope_that_says_two_things_is_refused(folder, tmp_path, changes, drop, rule):
    with pytest.raises(UserError, match=rule):
        open_published(with_config(folder, tmp_path, changes, drop))


def test_layers_after_the_last_are_known_by_their_tensors(tmp_path, tensors):
    last = K2["num_hidden_layers"] - 1
    extra = {
        n.replace(f"layers.{last}.", f"layers.{last + 1}."): v for n, v in tensors.items() if f"layers.{last}." in n
    }
    config = {k: v for k, v in K2.items() if k != "num_nextn_predict_layers"}
    place = write_checkpoint(tmp_path / "hf", config, {**tensors, **extra})
    with pytest.raises(UserError) as error:
        open_published(place)
    assert len(error.value.problems) == 1 and f"{len(extra)} tensors of layer {last + 1}, after the" in str(error.value)
    assert open_published(place, drop_mtp=True).tensors.keys() == tensors.keys()
    for count in ("1", 1.0, -1, [], True):
        (place / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": count}))
        with pytest.raises(UserError, match="num_nextn_predict_layers = .*: must be an integer of at least 0"):
            open_published(place)


@pytest.mark.parametrize("kind", ["F32", "BF16", "F8_E8M0"])
def test_block_scales_of_any_exact_kind(tmp_path, tensors, kind):
    """The same powers of two as scales give the same weights, whatever holds them."""
    drawn, out, expected = random.Random(3), {}, {}
    for name, value in tensors.items():
        if value.ndim == 2 and "proj" in name:
            blocks = [-(-n // 16) for n in value.shape]
            scales = np.array([2.0 ** drawn.randrange(-3, 4) for _ in range(blocks[0] * blocks[1])], np.float32)
            scales = scales.reshape(blocks)
            out[name], out[name + SCALE] = value.astype(ml_dtypes.float8_e4m3fn), scales.astype(DTYPES[kind])
            wide = scales.repeat(16, 0).repeat(16, 1)[: value.shape[0], : value.shape[1]]
            expected[name] = out[name].astype(np.float32) * wide
        else:
            out[name] = expected[name] = value
    quantization = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    place = write_checkpoint(tmp_path / "fp8", K2 | quantization, tensors)
    plain = write_checkpoint(tmp_path / "plain", K2, expected)
    for file in place.glob("*.safetensors*"):
        file.unlink()
    words = {dtype: word for word, dtype in DTYPES.items()}
    write_tensors(place, {n: NewTensor(v.shape, words[v.dtype], lambda v=v: v) for n, v in out.items()}, 10**9)
    got, want = (load_values(open_published(p), np.dtype(np.float32), None) for p in (place, plain))
    flat = [np.concatenate([np.ravel(x) for x in leaves(tree)]) for tree in (got, want)]
    np.testing.assert_array_equal(*flat)


def leaves(tree):
    return [x for value in tree.values() for x in (leaves(value) if isinstance(value, dict) else [np.asarray(value)])]


def test_long_lists_end_after_ten(tmp_path, tensors):
    place = write_checkpoint(tmp_path / "hf", K2, {f"other.{name}": value for name, value in tensors.items()})
    with pytest.raises(UserError) as error:
        open_published(place)
    assert len(error.value.problems) == 11 and "problems of this kind in all" in error.value.problems[-1]


def write_kimi(folder):
    """tiktoken.model of 259 ranks, and tokenizer_config.json with K2's names. Returns {id: name}."""
    ranks = [bytes([b]) for b in range(256)] + [b"th", b"the", b"in"]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)]
    (folder / "tiktoken.model").write_text("".join(lines))
    names = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 11: "<|tool_calls_section_begin|>", 22: "<think>", 255: "[PAD]"}
    names = {len(ranks) + i: name for i, name in names.items()}
    entries = {str(i): {"content": name, "special": True} for i, name in names.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    return names


def test_names_and_end_tokens_survive_a_round_trip(tmp_path):
    names = write_kimi(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [261, 260]}))
    config = {"bos_token_id": 259, "eos_token_id": 260}
    first = published_tokenizer(tmp_path, config)
    assert (first.bos, first.eos, first.ends, first.stops) == (259, 260, (261,), (260, 261))
    assert names.items() <= first.specials.items() and first.specials[264] == "<|reserved_token_264|>"
    (again := tmp_path / "again").mkdir()
    for name, content in tokenizer_files(first).items():
        (again / name).write_bytes(content)
    added = {e["id"]: e["content"] for e in json.loads((again / "tokenizer.json").read_text())["added_tokens"]}
    assert added == first.specials
    second = published_tokenizer(again, config)
    assert dataclasses.replace(second, spec="", _encode=None, _decode=None) == dataclasses.replace(
        first, spec="", _encode=None, _decode=None
    )
    assert load_tokenizer(str(tmp_path / "tiktoken.model")).encode("the").tolist() == [257]


def test_tokenizer_files_without_what_older_libraries_left_out(tmp_path):
    whole = train_bpe(iter(["the ferry left the pier with crates of kelp"] * 40), 300)
    parts = json.loads(whole.definition)
    for name in ("type", "added_tokens", "normalizer", "decoder", "pre_tokenizer"):
        legacy = json.loads(json.dumps(parts))
        (legacy["model"] if name == "type" else legacy).pop(name)
        (tmp_path / "legacy.json").write_text(json.dumps(legacy))
        try:
            same = load_tokenizer(str(tmp_path / "legacy.json")).encode("the ferry")
        except UserError as error:  # what is gone is needed: that the file cannot serve is said by name
            assert name != "type" and "legacy.json: " in str(error)
        else:
            assert name in ("type", "normalizer", "pre_tokenizer", "added_tokens")
            assert name == "pre_tokenizer" or same.tolist() == whole.encode("the ferry").tolist()
    parts["normalizer"] = {"type": "Sequence", "normalizers": []}
    (tmp_path / "empty.json").write_text(json.dumps(parts))
    assert load_tokenizer(str(tmp_path / "empty.json")).encode("the kelp").tolist() == whole.encode("the kelp").tolist()


@pytest.mark.parametrize(
    ("changes", "drop", "rule"),
    [({"n_gruop": 4}, ("n_group",), "'n_gruop': is not a known field; nearest: 'n_group'"),
     ({"rope_scalin": None}, ("rope_scaling",), "'rope_scalin': is not a known field; nearest: 'rope_scaling'"),
     ({"rope_scaling": {**K2["rope_scaling"], "low_freq_factor": 4}}, (), "has 'low_freq_factor', which k2jax has"),
     ({"rope_scaling": {**K2["rope_scaling"], "factor": "32"}}, (), "rope_scaling has factor = '32': must be a number"),
     ({"rope_theta": 10**400}, (), r"rope_theta = 1000\d*\.\.\.: must be less than 2\*\*63"),
     ({"hidden_size": {"a": 1}}, (), r"hidden_size = \{'a': 1\}: must be a number"),
     ({"q_lora_rank": []}, (), r"q_lora_rank = \[\]: must be a number or null"),
     ({"num_hidden_layers": 2**31}, (), "= 2147483648, n_routed_experts = 8: such a network has [0-9]* tensors"),
     ({"torch_dtype": "bfloat1"}, (), "torch_dtype = 'bfloat1': must be one of 'float32', 'bfloat16', 'float16', or"),
     ({"max_position_embeddings": 1.5}, (), "max_position_embeddings = 1.5: must be a positive integer, or absent"),
     ({"quantization_config": {"weight_block_sise": [4, 4]}}, (), "nearest: 'weight_block_size'")],
)  # fmt: skip
def test_fields_that_would_be_taken_for_another(folder, tmp_path, changes, drop, rule):
    with pytest.raises(UserError, match=rule):
        open_published(with_config(folder, tmp_path, changes, drop))


@pytest.mark.parametrize("count", [0, 1, None])
def test_layers_of_the_network_are_not_dropped_as_multi_token_prediction(folder, tmp_path, count):
    """A num_hidden_layers that is too small, with --drop-mtp."""
    place = with_config(
        folder, tmp_path, {"num_hidden_layers": 1 if count is None else 2 - count, "num_nextn_predict_layers": count}
    )
    with pytest.raises(UserError, match="num_hidden_layers = [12]: the files hold layers [12] to 2; must cover them"):
        open_published(place, drop_mtp=True)


def test_a_block_may_be_larger_than_its_tensor(tmp_path, tensors):
    """One scale for all of a tensor, as a block of any size that covers it says."""
    scaled = {n: v for n, v in tensors.items() if v.ndim == 2 and "proj" in n}
    low = {n: v.astype(ml_dtypes.float8_e4m3fn) for n, v in scaled.items()}
    low |= {n + SCALE: np.full((1, 1), 0.5, np.float32) for n in scaled}
    size = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2**40, 2**40]}}
    place = write_checkpoint(tmp_path / "hf", K2 | size, tensors)
    (place / "model.safetensors").unlink()
    words = {dtype: word for word, dtype in DTYPES.items()}
    write_tensors(
        place, {n: NewTensor(v.shape, words[v.dtype], lambda v=v: v) for n, v in {**tensors, **low}.items()}, 10**9
    )
    found, (name, *_) = open_published(place), scaled
    value = whole_value(found.tensors[name], found.tensors[name + SCALE], found.block)
    np.testing.assert_array_equal(value, low[name].astype(np.float32) * 0.5)


IDS = {"bos_token_id": 259, "eos_token_id": 260}


def entries_of(names, **flags):
    return {"added_tokens_decoder": {str(i): {"content": name, "special": True} | flags for i, name in names.items()}}


@pytest.mark.parametrize(
    ("settings", "rule"),
    [(entries_of({259: "[BOS]", 300: "[BOS]"}), r"'\[BOS\]' has 2 ids, must have one"),
     (entries_of({270: "the"}), "'the' of id 270 is an ordinary token"),
     (entries_of({5: "<x>"}), "names id 5, must be 259 to 514"),
     (entries_of({515: "<x>"}), r"names the ids \[515\], which the tokenizer of 515 ids does not have"),
     (entries_of({270: "\ud800"}), "must be {'content': NAME"),
     (entries_of({270: "<x>"}, special=1), "special = 1: must be true or false"),
     (entries_of({259: "[BOS]", 260: "[EOS]"}) | {"bos_token": "[EOS]"}, r"begins a text: config.json says \[259\]"),
     (entries_of({259: "[BOS]"}) | {"eos_token": "[EOT]"}, r"eos_token = '\[EOT\]': must be the name of a special"),
     ({"added_token_decoder": {}}, "'added_token_decoder': is not a known field; nearest: 'added_tokens_decoder'")],
)  # fmt: skip
def test_names_that_cannot_be(tmp_path, settings, rule):
    write_kimi(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=rule):
        published_tokenizer(tmp_path, IDS)


def test_names_that_differ_between_the_files(tmp_path):
    own = train_bpe(iter(["the ferry left the pier"] * 9), 290)
    (tmp_path / "tokenizer.json").write_bytes(own.definition)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(entries_of({0: "<|BOS|>"})))
    with pytest.raises(UserError, match=r"id 0 is '<\|BOS\|>', in tokenizer.json '<\|bos\|>'; must be the same"):
        published_tokenizer(tmp_path, {"bos_token_id": 0, "eos_token_id": 1})


def test_other_fields_of_published_files_are_not_taken_for_misspelled():
    """Beside files that leave out all that they may."""
    usual = "pad_token_id head_dim qk_head_dim num_local_experts mlp_bias dtype auto_map aux_loss_alpha seq_aux ep_size"
    usual += " pretraining_tp use_cache transformers_version attention_dropout output_router_logits initializer_range"
    usual += (
        " add_bos_token add_eos_token unk_token pad_token sep_token cls_token additional_special_tokens chat_template"
    )
    usual += " model_max_length clean_up_tokenization_spaces legacy eos_token_id_list forced_eos_token_id temperature"
    needed = dict.fromkeys(name for name in _COPIED if name not in _OPTIONAL)
    known = (*_KNOWN, "added_tokens_decoder", "bos_token", "eos_token")
    assert misspelled("x", needed | dict.fromkeys(usual.split()), known) == []
    assert misspelled("x", {"eos_token_id": 3}, ("bos_token", "eos_token")) == []  # in a tokenizer_config.json
    assert misspelled("x", {"add_eos_tokens": 3}, ("add_eos_token",)) != []


def test_a_tokenizer_larger_than_its_model(tmp_path):
    write_kimi(tmp_path)
    assert published_tokenizer(tmp_path, IDS | {"vocab_size": 515}).vocab_size == 515
    with pytest.raises(UserError, match="ids up to 514, config.json vocab_size = 514: must be at most 513"):
        published_tokenizer(tmp_path, IDS | {"vocab_size": 514})


def test_ids_that_only_the_tokenizer_config_names(tmp_path):
    """A tokenizer.json without ids in config.json, and an end token of its own beside that of config.json."""
    own = train_bpe(iter(["the ferry left the pier"] * 9), 290)
    (tmp_path / "tokenizer.json").write_bytes(own.definition)
    with pytest.raises(UserError) as error:
        published_tokenizer(tmp_path, {})
    assert [p.split(": ")[1] for p in error.value.problems] == ["bos_token_id", "eos_token_id"]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}})
    )
    found = published_tokenizer(tmp_path, {})
    assert (found.bos, found.eos, found.ends) == (0, 1, ())
    found = published_tokenizer(tmp_path, {"bos_token_id": 0, "eos_token_id": 7})
    assert (found.bos, found.eos, found.ends) == (0, 7, (1,))


def test_flags_of_special_tokens_are_kept(tmp_path):
    """<think> is not special in published files: a reader that leaves out special tokens keeps it."""
    write_kimi(tmp_path)
    entries = (
        entries_of({259: "[BOS]", 260: "[EOS]"})["added_tokens_decoder"]
        | entries_of({281: "<think>"}, special=False)["added_tokens_decoder"]
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    save_tokenizer(published_tokenizer(tmp_path, IDS), tmp_path / "kept")
    files = tokenizer_files(open_tokenizer(tmp_path / "kept"))
    flags = {token["id"]: token["special"] for token in json.loads(files["tokenizer.json"])["added_tokens"]}
    assert len(flags) == 256 and [i for i, special in flags.items() if not special] == [281]
    written = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]
    assert not written["281"]["special"] and written["260"]["special"]
    model = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert model.decode([259, 281, 260], skip_special_tokens=True) == "<think>"


def test_damaged_ranks_are_errors_and_never_tracebacks(tmp_path):
    write_kimi(tmp_path)
    path, draw = tmp_path / "tiktoken.model", random.Random(2)
    content, refused = path.read_bytes(), 0
    for _ in range(150):
        start, size = draw.randrange(len(content)), draw.choice([0, 1, 1, 2, 20])
        path.write_bytes(content[:start] + draw.randbytes(draw.choice([0, 1, 2])) + content[start + size :])
        try:
            published_tokenizer(tmp_path, IDS)
        except UserError as error:
            assert error.problems
            refused += 1
    assert refused > 100


def test_two_tokens_of_one_id_are_refused(tmp_path):
    parts = json.loads(train_bpe(iter(["the ferry left the pier"] * 9), 290).definition)
    parts["model"]["vocab"]["s"] = parts["model"]["vocab"]["t"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(UserError, match="'s' and 't' have the same id [0-9]*; ids must be unique"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_panic_of_the_tokenizers_library_is_an_error(tmp_path):
    parts = json.loads(train_bpe(iter(["the ferry left the pier"] * 9), 290).definition)
    parts["model"]["continuing_subword_prefix"] = "y" * 1000
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(UserError, match="tokenizer.json: is not one of the `tokenizers` library: range end index"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
