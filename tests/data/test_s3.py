"""Stores at s3:// URLs of a service that speaks S3, here a small server of this machine."""

import itertools
import os
import re

import numpy as np
import pytest
from s3_server import KEY, serve

from k2jax.config import Config, UserError
from k2jax.data import folder as module
from k2jax.data.batches import train_batches, validation_batches
from k2jax.data.corpus import open_corpus
from k2jax.data.folder import Folder
from k2jax.data.plan import plan_run
from k2jax.data.store_writer import TokenWriter
from k2jax.data.tokenizer import load_tokenizer
from k2jax.data.tokens import CorruptStore, TokenStore
from k2jax.launch.cli import main


def write(place):
    writer = TokenWriter(place, load_tokenizer("byte"), shard_tokens=256, chunk_tokens=64)
    for i in range(30):
        writer.append("train" if i % 3 else "validation", f"{i}", f"text {i} " * 9)
    writer.finish()


@pytest.fixture
def store(tmp_path):
    """On disk, in what is a bucket to the server."""
    write(tmp_path / "bucket/a store")
    return tmp_path / "bucket/a store"


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """All that the server is asked, by whoever has nothing but the environment."""
    context = module.shared_context.__wrapped__()
    monkeypatch.setattr(module, "shared_context", lambda: context)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY), monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with serve(tmp_path) as (url, asked):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"{url}/")
        yield asked


URL = "s3://bucket/a%20store"


def test_batches_are_those_of_the_local_store(store, asked):
    values = {"data.sequence_length": 20, "data.batch_sequences": 4, "train.eval_sequences": 4, "model.vocab_size": 258}
    config, found = Config().replace(values), []
    for place in (str(store), URL):
        corpus = open_corpus(place)
        batches = train_batches(corpus, plan_run(corpus, config)[0], config, 0)
        found.append([*itertools.islice(batches, 30), *validation_batches(corpus, config, 4, 2)])
    for local, remote in zip(*found, strict=True):
        assert local.keys() == remote.keys()
        [np.testing.assert_array_equal(local[name], remote[name]) for name in local]
    assert {method for method, *_ in asked} == {"HEAD", "GET"} and {bucket for _, bucket, *_ in asked} == {"bucket"}
    assert sum(not key for method, _, key, _ in asked if method == "GET") > 2  # pages of names


def test_damage_is_named(store, asked):
    shard = store / "train/text/00000/tokens/c/1"
    content = bytearray(shard.read_bytes())
    content[9] ^= 4
    shard.write_bytes(content)
    stream = TokenStore(URL).streams["train"]["text"]
    with pytest.raises(CorruptStore, match=f"^{URL}/train/text/00000/tokens/c/1: sha256 is "):
        stream.read(300, 310)
    shard.unlink()
    with pytest.raises(CorruptStore, match=f"^{URL}/train/text/00000/tokens/c/1: is missing; "):
        TokenStore(URL)


@pytest.mark.parametrize(
    "url, message",
    [
        ("s3://nothing/store", "s3://nothing/store/: NOT_FOUND: NoSuchBucket"),
        ("s3://private/store", "s3://private/store/manifest.json: PERMISSION_DENIED: AccessDenied"),
        ("s3://bucket/store", "s3://bucket/store: is no token store, it has no manifest.json"),
        ("s3:///store", "s3:///store: is no folder that can be opened: .* bucket name"),
    ],
)
def test_what_cannot_be_opened_is_the_users_to_mend(store, asked, url, message, capfd):
    (store / "config.py").write_text("from k2jax.config import Config as config\n")
    assert main(["audit", str(store / "config.py"), "--step", "0", "--data.path", url]) == 2
    said = capfd.readouterr().err
    assert re.search(f"k2jax audit: 1 problem\n  {message}.*\n$", said), said


def test_a_written_store_is_the_same(store, asked):
    write("s3://bucket/written")
    written, names = store.parent / "written", Folder(URL).names()
    assert Folder("s3://bucket/written").names() == names == Folder(store).names()
    assert all((written / name).read_bytes() == (store / name).read_bytes() for name in names)
    Folder("s3://bucket/written").remove("train/")
    assert not [name for name in Folder("s3://bucket/written").names() if name.startswith("train/")]


def test_variables(store, asked, monkeypatch):
    TokenStore(URL)
    assert asked[0] == ("HEAD", "bucket", "", None) and {region for *_, region in asked[1:]} == {"us-east-1"}
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1"), monkeypatch.setenv("AWS_REGION", "auto")
    asked.clear()
    TokenStore(URL)
    assert {region for *_, region in asked} == {"auto"}
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "minio:9000")
    with pytest.raises(UserError, match=f"^{URL}: is no folder that can be opened: .*minio:9000 has invalid scheme"):
        TokenStore(URL)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", ""), monkeypatch.setenv("AWS_ENDPOINT_URL", "")
    assert Folder(URL).spec("x") == {"driver": "s3", "bucket": "bucket", "path": "a store/x/"}  # Amazon's own
