"""Guards of the structure: packages, import directions, lazy imports, frozen public names."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = PROJECT["tool"]["setuptools"]["package-dir"]  # import name -> folder
FOLDERS = sorted(MAPPED.values())


def _fresh(code: str) -> list[str]:
    """Run `code` in a new interpreter; return the JSON list it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_packages_are_what_the_file_system_holds() -> None:
    found = set()
    for name, folder in MAPPED.items():
        found.add(name)
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder)
            found.add(".".join([name, *inner.parts]))
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


def test_every_python_file_lies_in_a_listed_package() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    for name, folder in MAPPED.items():
        for file in (ROOT / folder).rglob("*.py"):
            package = ".".join([name, *file.parent.relative_to(ROOT / folder).parts])
            assert package in listed, f"{file} would be missing from the wheel"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_mapped_folder_can_be_imported_by_its_bare_name(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), (
        f"{folder}/__init__.py would shadow other projects called '{folder}' whenever the repository is on sys.path"
    )


def test_tests_are_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_file_is_called_utils_or_common() -> None:
    bad = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py") if p.stem in {"utils", "common", "helpers"}]
    assert not bad


LAZY = {
    # module: what a fresh process must not have imported after it
    "longspan.kernels.attention": {"torch", "triton"},
    "longspan.kernels.attention.spec": {"torch", "triton"},
    "longspan.kernels.attention.registry": {"triton", "lightning", "transformers"},
    "longspan.kernels.testing": {"hypothesis", "triton", "lightning", "transformers"},
    "longspan.model.config": {"torch", "pydantic"},
    "longspan.model.zoo": {"torch"},
    "longspan.model.decoder": {"triton", "lightning", "transformers", "datasets", "tokenizers"},
    "longspan.model.generation": {"triton", "lightning", "transformers", "datasets", "tokenizers"},
    "longspan.data.loader": {"lightning", "transformers", "triton"},
    "longspan.evaluation.perplexity.sliding_window": {"lightning", "hydra", "transformers", "matplotlib", "triton"},
    "longspan.evaluation.tasks.registry": {"torch", "matplotlib"},
    "longspan.evaluation.reporting.run_report": {"torch", "matplotlib"},
    "longspan.evaluation.ablation.report": {"torch", "matplotlib"},
    "longspan.training.schema": {"torch", "lightning"},
    # (Lightning's torchmetrics imports transformers wherever that is installed; we do not.)
    "longspan.training.run": {"wandb", "hydra"},
    "longspan.scripts.cli": {"torch", "lightning", "transformers", "datasets", "wandb"},
}


@pytest.mark.parametrize("module", LAZY)
def test_imports_stay_lazy(module: str) -> None:
    loaded = _fresh(
        f"import importlib, json, sys; importlib.import_module({module!r});"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    assert not LAZY[module] & set(loaded)


def test_triton_and_transformers_are_not_needed() -> None:
    """With both blocked, the attention core still attends."""
    loaded = _fresh(
        "import sys, json; sys.modules['triton'] = None; sys.modules['transformers'] = None\n"
        "import torch\n"
        "from longspan.kernels.attention import AttentionSpec, attend, available\n"
        "q = torch.ones(1, 3, 2, 4)\n"
        "out = attend(q, q, q, spec=AttentionSpec(causal=True)).out\n"
        "assert torch.equal(out, q), out\n"
        "print(json.dumps(sorted(available())))"
    )
    assert {"reference", "sdpa", "flex"} <= set(loaded)


SIGNATURES = {
    "longspan.kernels.attention.attend": "q_BTHD k_BSGD v_BSGE * spec context params backend return_lse",
    "longspan.kernels.attention.explain": "spec call",
    "longspan.kernels.attention.merge_partials": "parts",
    "longspan.kernels.testing.conformance": "backend * device dtypes examples features seed max_length thorough",
    "longspan.kernels.testing.cache_conformance": "make_cache * device dtypes backend stored without examples seed "
    "max_length thorough",
    "longspan.model.cache.create_cache": "model batch length * kind storage page_size dtype device globals_possible",
    "longspan.model.cache.cache_bytes": "config batch length dtype * kind storage page_size globals_possible",
    "longspan.model.zoo.build": "name overrides * seed",
    "longspan.model.checkpoint.load_model": "directory * device dtype fused_qkv",
    "longspan.model.checkpoint.save_model": "model directory tokenizer * lineage state also overwrite",
    "longspan.model.surgery.convert_model": "checkpoint output surgeries * overwrite progress",
    "longspan.model.surgery.plan_conversion": "checkpoint surgeries",
    "longspan.model.decoder.Decoder.forward": "self tokens_BT context * positions_BT cache",
    "longspan.model.generation.generate": "model tokens_BT * max_new_tokens temperature top_k top_p min_p "
    "repetition_penalty seed seeds stop_tokens pad_token prompt_mask_BT is_global_BT num_beams length_penalty cache "
    "storage on_token prefill_chunk steps",
    "longspan.model.generation.complete": "model prompts sampling * tokenizer stop_strings global_positions cache "
    "storage on_text steps",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_signatures_are_frozen(name: str) -> None:
    """What is before the star is called by position: changing this line is a decision about users' code."""
    import importlib
    import inspect

    parts = name.split(".")
    target: object = importlib.import_module(".".join(parts[:3]))
    for attribute in parts[3:]:
        target = getattr(target, attribute)
    words: list[str] = []
    for parameter in inspect.signature(target).parameters.values():  # pyright: ignore[reportArgumentType]
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        words.append(parameter.name)
    assert " ".join(words) == SIGNATURES[name]


PUBLIC = {
    "longspan.kernels.attention": [
        "AttentionBackend",
        "AttentionCall",
        "AttentionContext",
        "AttentionOutput",
        "AttentionParams",
        "AttentionSpec",
        "BlockLayout",
        "Capabilities",
        "Feature",
        "Phase",
        "Reason",
        "UnsupportedAttention",
        "Window",
        "attend",
        "available",
        "explain",
        "merge_partials",
        "register",
    ],
    "longspan.kernels.testing": [
        "NEEDS_HYPOTHESIS",
        "CacheCase",
        "CacheReport",
        "Case",
        "ConformanceError",
        "Report",
        "assert_within_budget",
        "cache_conformance",
        "conformance",
        "judge",
        "plain_attention",
        "replay",
        "twin",
    ],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_frozen(module: str) -> None:
    """Adding a public name is a decision: write it here too. Removing one breaks users."""
    import importlib

    face = importlib.import_module(module)
    assert sorted(face.__all__) == sorted(PUBLIC[module])
    for name in face.__all__:
        assert getattr(face, name) is not None


def test_schema_and_signatures_hold_no_kwargs() -> None:
    """`**kwargs` in a signature is how options get lost in silence."""
    import ast

    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    assert node.args.kwarg is None, f"{file}:{node.lineno} {node.name} takes **{node.args.kwarg.arg}"


def test_a_planted_import_breaks_the_contracts(tmp_path: Path) -> None:
    """import-linter finds an upward import and a forbidden library, so a green `make contracts` means something."""
    farm = tmp_path / "longspan"
    farm.mkdir()
    for name, folder in MAPPED.items():
        target = farm / name.removeprefix("longspan.")
        if folder == "model":
            target.mkdir()
            for file in (ROOT / folder).glob("*.py"):
                (target / file.name).write_text(file.read_text())
            planted = "import lightning, pydantic, triton\nfrom longspan.training import run\n"
            (target / "planted.py").write_text(planted)
        else:
            target.symlink_to(ROOT / folder)
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--config", str(ROOT / ".importlinter"), "--no-cache"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        timeout=180,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "longspan.model.planted -> longspan.training.run" in done.stdout
    for library in ("lightning", "pydantic", "triton"):
        assert f"longspan.model.planted -> {library}" in done.stdout


def test_pyright_sees_through_the_farm(tmp_path: Path) -> None:
    """A planted type error across folders is found, so `0 errors` is not `0 files`."""
    planted = tmp_path / "planted.py"
    planted.write_text(
        "from longspan.kernels.attention.spec import Window\n\nwindow: int = Window.causal_keys('three')\n"
    )
    config = {
        "include": [str(planted)],
        "extraPaths": [str(ROOT / ".typing")],
        "pythonVersion": "3.11",
        "reportMissingImports": "error",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    done = subprocess.run(
        [str(Path(sys.executable).with_name("pyright")), "--outputjson", "-p", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=180,
    )
    report = json.loads(done.stdout)
    rules = [entry["rule"] for entry in report["generalDiagnostics"]]
    assert sorted(rules) == ["reportArgumentType", "reportAssignmentType"], done.stdout


def test_wheel_lists_the_configs() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]
    assert data["longspan.configs"] == ["**/*.yaml"]
    assert list((ROOT / "configs").rglob("*.yaml"))
