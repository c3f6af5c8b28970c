"""Stores at s3:// and gs:// URLs of services that speak S3 or GCS, here a small server of this machine."""

import itertools
import os
import re
import shutil

import numpy as np
import pytest
from token_writer import TokenWriter

from k2jax.cli.main import main
from k2jax.config import Config
from k2jax.data.loader.batches import train_batches, validation_batches
from k2jax.data.loader.corpus import open_corpus
from k2jax.data.loader.segments import settle_timeline
from k2jax.data.store.manifest import CorruptStore
from k2jax.data.store.reader import TokenStore
from k2jax.data.tokenizer import load_tokenizer
from k2jax.errors import UserError
from k2jax.storage import Folder


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


URL = "s3://bucket/a%20store"


@pytest.fixture(params=["s3", "gs"])
def url(request, s3, gcs):
    return URL.replace("s3", request.param)


def test_batches_are_those_of_the_local_store(store, url, s3, gcs):
    values = {"data.sequence_length": 20, "data.batch_sequences": 4, "train.eval_sequences": 4, "model.vocab_size": 258}
    config, found = Config().replace(values), []
    for place in (str(store), url):
        corpus = open_corpus(place)
        batches = train_batches(corpus, settle_timeline(corpus, config)[0], config, 0)
        found.append([*itertools.islice(batches, 30), *validation_batches(corpus, config, 4, 2)])
    for local, remote in zip(*found, strict=True):
        assert local.keys() == remote.keys()
        [np.testing.assert_array_equal(local[name], remote[name]) for name in local]
    assert {(method, bucket) for method, bucket, *_ in s3 + gcs} <= {("HEAD", "bucket"), ("GET", "bucket")}
    assert sum(method == "GET" and not key for method, _, key, *_ in s3 + gcs) > 2  # pages of names


def test_damage_is_named(store, url):
    shard = store / "train/text/00000/tokens/c/1"
    content = bytearray(shard.read_bytes())
    content[9] ^= 4
    shard.write_bytes(content)
    stream = TokenStore(url).streams["train"]["text"]
    with pytest.raises(CorruptStore, match=f"^{url}/train/text/00000/tokens/c/1: sha256 is "):
        stream.read(300, 310)
    shard.unlink()
    with pytest.raises(CorruptStore, match=f"^{url}/train/text/00000/tokens/c/1: is missing; "):
        TokenStore(url)


@pytest.mark.parametrize(
    "place, message",
    [
        ("s3://nothing/store", "s3://nothing/store/: NOT_FOUND: NoSuchBucket"),
        ("s3://private/store", "s3://private/store/manifest.json: PERMISSION_DENIED: AccessDenied"),
        ("s3://bucket/store", "s3://bucket/store: is not a token store .no manifest.json."),
        ("gs://nothing/store", "gs://nothing/store: is not a token store .no manifest.json."),
        ("gs://private/store", "gs://private/store/manifest.json: PERMISSION_DENIED: .*AccessDenied"),
        ("s3:///store", "s3:///store: is not a folder that can be opened: .* bucket name"),
    ],
)
def test_what_cannot_be_opened_is_the_users_to_mend(store, s3, gcs, place, message, capfd):
    (store / "config.py").write_text("from k2jax.config import Config as config\n")
    assert main(["audit", str(store / "config.py"), "--step", "0", "--data.path", place]) == 2
    said = capfd.readouterr().err
    assert re.search(f"k2jax audit: 1 problem\n  {message}.*\n$", said), said


def test_a_bucket_whose_files_can_be_read_and_not_listed(store, url):
    shutil.move(store.parent, store.parent.with_name("unlisted"))
    with pytest.raises(
        UserError, match="unlisted/a%20store/?: (PERMISSION_DENIED|its files cannot be listed)"
    ) as error:
        TokenStore(url.replace("bucket", "unlisted"))
    assert len(error.value.problems) == 1


def test_a_written_store_is_the_same(store, url):
    written, names = Folder(url.replace("a%20store", "written")), Folder(store).names()
    write(written)
    assert written.names() == names
    assert all((store.parent / "written" / name).read_bytes() == (store / name).read_bytes() for name in names)
    written.remove("train/")
    assert written.names() == [name for name in names if not name.startswith("train/")]


def test_variables_of_s3(store, s3, monkeypatch):
    TokenStore(URL)
    assert s3[0] == ("HEAD", "bucket", "", None) and {region for *_, region in s3[1:]} == {"us-east-1"}
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1"), monkeypatch.setenv("AWS_REGION", "auto")
    s3.clear()
    TokenStore(URL)
    assert {region for *_, region in s3} == {"auto"}
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "minio:9000")
    with pytest.raises(UserError, match=f"^{URL}: is not a folder that can be opened: .*minio:9000 has invalid scheme"):
        TokenStore(URL)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", ""), monkeypatch.setenv("AWS_ENDPOINT_URL", "")
    assert Folder(URL).spec("x") == {"driver": "s3", "bucket": "bucket", "path": "a store/x/"}  # Amazon's own
