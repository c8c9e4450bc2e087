import json
import sys
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub import errors as hub

from gkd_dsl.models.describe import describe
from gkd_dsl.models.errors import ModelError
from gkd_dsl.models.locate import locate, read_config


def failure(location, **kwargs):
    with pytest.raises(ModelError) as error:
        describe(location, **{"offline": True, **kwargs})
    assert error.value.reason
    return error.value


def test_a_folder_is_relative_to_the_spec_then_to_here(save, tmp_path, monkeypatch):
    save("bert", "specs/model")
    save("bert", "here/model")
    save("bert", "here/other")
    monkeypatch.chdir(tmp_path / "here")
    assert locate("model", root=tmp_path / "specs") == tmp_path / "specs" / "model"
    assert locate("./other", root=tmp_path / "specs").resolve() == tmp_path / "here" / "other"
    assert locate(str(tmp_path / "here" / "other")) == tmp_path / "here" / "other"


def test_a_missing_folder_offers_its_siblings(save, tmp_path):
    save("bert", "teacher_large")
    save("bert", "student")
    error = failure("./teacher_larg", root=tmp_path)
    assert error.near == ["./teacher_large"]
    assert error.hint == "did you mean ./teacher_large?"
    assert failure(str(tmp_path / "studnet")).near == [str(tmp_path / "student")]
    assert failure("./quite_else", root=tmp_path).near == []


def test_a_bare_name_is_a_folder_or_a_hub_id(save, tmp_path):
    save("bert", "teacher")
    error = failure("teachre", root=tmp_path)
    assert "not in the local hub cache" in error.reason
    assert error.near == ["teacher"]


def test_a_file_is_not_a_folder(save, tmp_path):
    save("bert")
    assert "is a file" in failure("bert/config.json", root=tmp_path).reason


def test_a_folder_without_config_points_below(save, tmp_path):
    save("bert", "all/small")
    error = failure("all", root=tmp_path)
    assert "no config.json" in error.reason
    assert error.near == ["all/small"]
    (tmp_path / "empty").mkdir()
    assert failure("empty", root=tmp_path).near == []


def test_broken_json_has_its_place(tmp_path):
    (tmp_path / "config.json").write_text('{\n  "model_type": "bert",\n  "hidden_size": 12,,\n}')
    error = failure(str(tmp_path))
    assert "line 3, column 21" in error.reason


@pytest.mark.parametrize("text", ["[1]", "3", '"bert"'])
def test_a_config_is_an_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert "not an object" in failure(str(tmp_path)).reason


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    assert "not UTF-8" in failure(str(tmp_path)).reason


def test_an_unreadable_config(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ModelError, match="Permission denied"):
        read_config(tmp_path, "m")


def test_a_config_says_its_type(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    assert "no model_type" in failure(str(tmp_path)).reason


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with a model inside, which fails when it is imported."""
    root = tmp_path / "site" / "tiny_pkg_models"
    (root / "model").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    (root / "model" / "config.json").write_text('{"model_type": "bert"}')
    (root / "model" / "pooling").mkdir()
    (root / "model" / "pooling" / "config.json").write_text('{"pool": true}')
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return root


def test_inside_a_package(package):
    assert locate("package:tiny_pkg_models") == package / "model"
    assert locate("package:tiny_pkg_models/model") == package / "model"
    assert "tiny_pkg_models" not in sys.modules


def test_package_errors(package):
    assert failure("package:tiny_pkg_models/modle").near == ["package:tiny_pkg_models/model"]
    assert "not installed" in failure("package:no_such_package_here").reason
    assert "does not name a package" in failure("package:").reason
    assert "does not name a package" in failure("package:a-b").reason
    assert "single module" in failure("package:this").reason
    assert "no subpackage" in failure("package:tiny_pkg_models.deeper").reason
    assert "holds no model" in failure("package:json").reason


def test_a_package_with_two_models(package):
    (package / "second").mkdir()
    (package / "second" / "config.json").write_text('{"model_type": "gpt2"}')
    error = failure("package:tiny_pkg_models")
    assert "holds 2 models" in error.reason
    assert error.near == ["package:tiny_pkg_models/model", "package:tiny_pkg_models/second"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache that holds org/tiny at main and at v1."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    repo = tmp_path / "models--org--tiny"
    for revision, digit, width in (("main", "1", 8), ("v1", "2", 4)):
        snapshot = repo / "snapshots" / (digit * 40)
        snapshot.mkdir(parents=True)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(digit * 40)
        config = {"model_type": "bert", "hidden_size": width, "num_attention_heads": 2}
        (snapshot / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_hub_id_in_the_cache(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("went online"))
    assert describe("org/tiny").size("H") == 8
    assert describe("org/tiny@v1").size("H") == 4
    assert describe("org/tiny@v1").path.endswith("2" * 40)


def test_a_hub_id_not_in_the_cache(cache, monkeypatch):
    assert "not in the local hub cache" in failure("org/large").reason
    assert "--online" in failure("org/large").hint
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "not in the local hub cache" in failure("org/large", offline=False).reason


def test_only_config_and_tokenizer_are_fetched(cache, monkeypatch, tmp_path):
    asked = []
    folder = tmp_path / "fetched"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')

    def download(repo, name, revision=None):
        asked.append(name)
        if name != "config.json":
            raise hub.LocalEntryNotFoundError("absent")
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert describe("org/large@abc").family == "bert"
    assert asked[0] == "config.json"
    assert all("tokenizer" in name or "vocab" in name or "merges" in name or "special" in name for name in asked[1:])


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (lambda: hub.RepositoryNotFoundError.__new__(hub.RepositoryNotFoundError), "no such model on the hub"),
        (lambda: hub.GatedRepoError.__new__(hub.GatedRepoError), "gated"),
        (lambda: hub.RevisionNotFoundError.__new__(hub.RevisionNotFoundError), "no revision v9"),
        (lambda: hub.RemoteEntryNotFoundError.__new__(hub.RemoteEntryNotFoundError), "no config.json on the hub"),
        (lambda: hub.LocalEntryNotFoundError("offline"), "cannot be reached"),
        (lambda: OSError("disk full"), "disk full"),
    ],
)
def test_what_the_hub_answers(cache, monkeypatch, raised, said):
    def download(*args, **kwargs):
        raise raised()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert said in failure("org/large@v9", offline=False).reason


def test_what_is_no_location():
    assert "empty" in failure(" ").reason
    assert "no folder" in failure("a b/c?").reason
    assert "neither a folder nor" in failure("a--b/..c").reason
