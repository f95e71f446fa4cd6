"""The manifests in cluster/ agree with each other and with the package.

For Kubernetes, `ray up`, Docker and the reader of the page.
"""

import dataclasses
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import local
from shardmap.jobs.cli import main
from shardmap.jobs.config import RunConfig, load

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
PAGE = (CLUSTER / "README.md").read_text()
BLOCKS = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)]
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"registry.example.com/shardmap:{PROJECT['version']}-ray{PINS['ray']}"
CLAIM, RAYJOB = yaml.safe_load_all((CLUSTER / "rayjob.yaml").read_text())
RAY_UP = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())
SPEC = RAYJOB["spec"]
HEAD = SPEC["rayClusterSpec"]["headGroupSpec"]
(WORKERS,) = SPEC["rayClusterSpec"]["workerGroupSpecs"]
ENTRYPOINT = shlex.split(SPEC["entrypoint"])


def pod(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(group)["containers"]
    return only


def gibibytes(quantity: str) -> float:
    assert quantity.endswith("Gi"), quantity
    return float(quantity.removesuffix("Gi"))


def runs() -> list[list[str]]:
    """Every `shardmap run` of the page and the manifests: the words after it."""
    found = [shlex.split(command) for command in COMMANDS if "shardmap run" in command] + [
        ENTRYPOINT
    ]
    return [words[words.index("run") + 1 :] for words in found]


def keys(words: list[str]) -> dict[str, str]:
    """The overrides: `--key value` pairs."""
    options = words[1:]
    assert len(options) % 2 == 0
    assert all(key.startswith("--") for key in options[::2]), options
    return {
        key.removeprefix("--"): value
        for key, value in zip(options[::2], options[1::2], strict=True)
    }


def local_path(path: str) -> Path:
    """Path in the repository of a file of the image."""
    (workdir,) = re.findall(r"^WORKDIR (\S+)$", DOCKERFILE, re.MULTILINE)
    return ROOT / path.removeprefix(workdir + "/")


def test_one_image_everywhere() -> None:
    assert (
        container(HEAD)["image"]
        == container(WORKERS)["image"]
        == RAY_UP["docker"]["image"]
        == IMAGE
    )
    assert set(re.findall(r"registry\.example\.com/\S+\w", PAGE + DOCKERFILE)) == {IMAGE}


def test_versions_are_those_of_the_constraints() -> None:
    assert SPEC["rayClusterSpec"]["rayVersion"] == PINS["ray"]
    base, python = re.findall(r"^FROM rayproject/ray:([\d.]+)-py(\d+)$", DOCKERFILE, re.MULTILINE)[
        0
    ]
    assert base == PINS["ray"]
    assert f"Programming Language :: Python :: {python[0]}.{python[1:]}" in PROJECT["classifiers"]
    assert 'pip install --no-cache-dir -c constraints.txt ".[all]"' in DOCKERFILE
    assert "all" in PROJECT["optional-dependencies"]


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    copied = [
        word
        for line in re.findall(r"^COPY --chown=ray:users (.*) \S+$", DOCKERFILE, re.MULTILINE)
        for word in line.split()
    ]
    assert len(re.findall(r"^COPY ", DOCKERFILE, re.MULTILINE)) == 3
    assert [name for name in copied if not (ROOT / name).exists()] == []
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    assert {f"!{name}" for name in copied} == {line for line in ignore if line.startswith("!")}
    needed = {
        "pyproject.toml",
        "constraints.txt",
        "shardmap",
        PROJECT["readme"],
        *PROJECT["license-files"],
    }
    assert needed <= set(copied)


@pytest.mark.parametrize("words", runs(), ids=" ".join)
def test_a_run_has_a_configuration_and_known_keys(words: list[str]) -> None:
    config = local_path(words[0])
    load(config)
    known = {field.name for field in dataclasses.fields(RunConfig)}
    assert [key for key in keys(words) if key.partition(".")[0] not in known] == []
    load(config, words[1:])


def test_the_job_resumes_and_cleans_up() -> None:
    assert (RAYJOB["apiVersion"], RAYJOB["kind"]) == ("ray.io/v1", "RayJob")
    assert ENTRYPOINT[:2] == ["shardmap", "run"]
    words = keys(ENTRYPOINT[2:])
    assert words["devices"] == "ray"
    assert words["resume"] == "true"  # else the second attempt would compute everything again
    assert SPEC["backoffLimit"] >= 1
    assert SPEC["shutdownAfterJobFinishes"] is True
    assert SPEC["ttlSecondsAfterFinished"] > 0


def test_results_are_on_a_volume_that_head_and_workers_mount() -> None:
    assert CLAIM["kind"] == "PersistentVolumeClaim"
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in (HEAD, WORKERS):
        (volume,) = (
            v
            for v in pod(group)["volumes"]
            if v.get("persistentVolumeClaim") == {"claimName": CLAIM["metadata"]["name"]}
        )
        (mount,) = (
            m["mountPath"] for m in container(group)["volumeMounts"] if m["name"] == volume["name"]
        )
        words = keys(ENTRYPOINT[2:])
        assert Path(words["store"]).is_relative_to(mount)
        assert Path(words["output"]).is_relative_to(mount)
    assert any(option.endswith(f":{mount}") for option in RAY_UP["docker"]["run_options"])


def test_every_mount_has_a_volume_and_shared_memory_holds_the_object_store() -> None:
    for group in (HEAD, WORKERS):
        volumes = {volume["name"]: volume for volume in pod(group)["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container(group)["volumeMounts"]}
        assert set(mounts.values()) == set(volumes)
        shared = volumes[mounts["/dev/shm"]]["emptyDir"]
        assert shared["medium"] == "Memory"
        memory = gibibytes(container(group)["resources"]["limits"]["memory"])
        assert (
            0.3 * memory <= gibibytes(shared["sizeLimit"]) <= 0.5 * memory
        )  # Ray takes 30% for objects


def test_the_head_computes_nothing_and_workers_have_the_gpus_they_claim() -> None:
    assert HEAD["rayStartParams"]["num-cpus"] == "0"
    assert all(
        isinstance(value, str)
        for group in (HEAD, WORKERS)
        for value in group["rayStartParams"].values()
    )
    assert "nvidia.com/gpu" not in container(HEAD)["resources"]["limits"]
    for kind in ("requests", "limits"):
        assert (
            container(WORKERS)["resources"][kind]["nvidia.com/gpu"]
            == WORKERS["rayStartParams"]["num-gpus"]
        )
    assert container(WORKERS)["resources"]["requests"] == container(WORKERS)["resources"]["limits"]
    assert WORKERS["minReplicas"] <= WORKERS["replicas"] <= WORKERS["maxReplicas"]
    gpus = int(WORKERS["rayStartParams"]["num-gpus"])
    assert WORKERS["minReplicas"] >= 1  # a map is refused where no machine has what a worker needs
    assert int(keys(ENTRYPOINT[2:])["workers"]) <= gpus * WORKERS["maxReplicas"]


def test_ray_up_fits_rays_schema() -> None:
    autoscaler = pytest.importorskip("ray.autoscaler")
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(
        RAY_UP, json.loads((Path(autoscaler.__file__).parent / "ray-schema.json").read_text())
    )


def test_ray_up_agrees_with_itself() -> None:
    types = RAY_UP["available_node_types"]
    head, workers = types.pop(RAY_UP["head_node_type"]), types
    try:
        assert head["resources"] == {"CPU": 0}
        assert any(
            "--num-cpus=0" in command and "ray_bootstrap_config" in command
            for command in RAY_UP["head_start_ray_commands"]
        )
        (gpu,) = workers.values()
        assert 1 <= gpu["min_workers"] <= gpu["max_workers"] <= RAY_UP["max_workers"]
        (number,) = re.findall(r"--num-gpus=(\d+)", " ".join(RAY_UP["worker_start_ray_commands"]))
        assert gpu["resources"]["GPU"] == int(number)
        assert "--gpus all" in RAY_UP["docker"]["worker_run_options"]
        assert gpu["max_workers"] == WORKERS["maxReplicas"]
    finally:
        types[RAY_UP["head_node_type"]] = head
    assert any("--port=6379" in command for command in RAY_UP["head_start_ray_commands"])
    assert any("$RAY_HEAD_IP:6379" in command for command in RAY_UP["worker_start_ray_commands"])


def test_files_and_links_of_the_page_are_there() -> None:
    assert len(COMMANDS) > 10
    text = "\n".join(COMMANDS)
    named = {word for word in re.findall(r"\b(?:cluster|configs)/[\w./-]+\w", text + PAGE)}
    assert {"cluster/rayjob.yaml", "cluster/ray-up.yaml", "cluster/Dockerfile"} <= named
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [
        module
        for module in re.findall(r"python -m (\S+)", text)
        if not (ROOT / (module.replace(".", "/") + ".py")).exists()
    ] == []
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", PAGE) if "://" not in target]
    assert [target for target in targets if not (CLUSTER / target).exists()] == []


def test_rays_commands_take_these_options() -> None:
    known = pytest.importorskip("ray.scripts.scripts").cli
    starts = [*RAY_UP["head_start_ray_commands"], *RAY_UP["worker_start_ray_commands"]]
    commands = [
        shlex.split(command) for command in [*COMMANDS, *starts] if command.startswith("ray ")
    ]
    assert len(commands) >= 12
    for _, name, *words in commands:
        command = known.commands[name]
        if name == "job":
            command = command.commands[words.pop(0)]
        options = {
            option
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        own = words[: words.index("--")] if "--" in words else words
        assert {word.partition("=")[0] for word in own if word.startswith("--")} <= options, name


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("shardmap ")])
def test_shardmap_has_this_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command.split()[1], "--help"])
    assert end.value.code == 0


def test_the_local_cluster_takes_these_options() -> None:
    given = [
        shlex.split(command)[3:]
        for command in COMMANDS
        if command.startswith("python -m cluster.local")
    ]
    assert len(given) == 2
    for words in given:
        cut = words.index("--") if "--" in words else len(words)
        assert local.parse(words[:cut]).nodes == 3
