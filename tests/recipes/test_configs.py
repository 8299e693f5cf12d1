"""Every YAML is read by the parser of its recipe and by accelerate, and every command that is written down exists."""

import re

import dpo
import extend_sft
import grpo
import kto
import pytest
import sft
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from tests.recipes.conftest import RECIPES, ROOT

PARSERS = {
    "sft": sft.make_parser,
    "extend": extend_sft.make_parser,
    "dpo": dpo.make_parser,
    "kto": kto.make_parser,
    "grpo": grpo.make_parser,
    "nthr": grpo.make_parser,
}
CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))
LAUNCH = sorted((RECIPES / "accelerate_configs").glob("*.yaml"))
SCRIPTS = [RECIPES / f"{name}.py" for name in ("sft", "extend_sft", "dpo", "kto", "grpo")]
# questions a batch, questions an update, GPUs that the file is written for, updates
PAPER_BATCHES = {
    "qwen2.5_0.5b_nthr": (32, 16, 1, 105 * 2),
    "qwen2.5_1.5b_nthr": (256, 64, 8, 40 * 4),
    "qwen2.5_math_1.5b_nthr": (256, 64, 8, 40 * 4),
}


def parse(path):
    """The parsed arguments of a config; the flags of machines that this one may not be are overruled."""
    parser = PARSERS[path.stem.rsplit("_", 1)[1]]()
    return parser.parse_args_and_config(["--config", str(path), "--bf16", "false", "--use_cpu", "true"])


def test_every_model_and_task_has_a_file():
    expected = {f"smollm2_135m_{task}" for task in ("sft", "extend", "dpo", "kto", "grpo", "nthr")}
    expected |= {f"qwen2.5_0.5b_{task}" for task in ("sft", "extend", "dpo", "nthr")}
    expected |= {"qwen2.5_1.5b_nthr", "qwen2.5_math_1.5b_nthr"}
    expected |= {f"pythia_{size}_{task}" for size in ("410m", "1b") for task in ("sft", "extend", "dpo")}
    assert {path.stem for path in CONFIGS} == expected


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_reaches_its_field(path):
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    parts = parse(path)
    read = {name: value for part in parts for name, value in vars(part).items()}
    for name, value in given.items():
        if name in ("bf16", "use_cpu", "gradient_accumulation_steps"):
            continue
        field = read[name]
        if name == "lr_scheduler_type":
            field = field.value
        if name == "optim":
            field = str(field.value)
        if name == "report_to":
            field = field[0] if field else "none"
        assert field == value, name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_file_trains_the_model_of_its_name_and_writes_beside_it(path):
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    model, task = path.stem.rsplit("_", 1)
    assert given["output_dir"] == f"runs/{model}/{task}"
    assert given["report_to"] == "trackio"
    if given["model_name_or_path"].startswith("runs/"):
        assert given["model_name_or_path"] == f"runs/{model}/sft"
    else:
        squeezed = re.sub(r"[^a-z0-9.]", "", given["model_name_or_path"].lower())
        assert model.replace("_", "") in squeezed


@pytest.mark.parametrize("name", PAPER_BATCHES)
def test_nthr_files_hold_the_batches_of_the_paper(name):
    questions, update, gpus, updates = PAPER_BATCHES[name]
    given = yaml.safe_load((RECIPES / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    each = given["per_device_train_batch_size"] * gpus
    assert each * given["gradient_accumulation_steps"] == update * given["num_generations"]
    assert each * given["steps_per_generation"] == questions * given["num_generations"]
    assert given["max_steps"] == updates


def test_grpo_and_nthr_differ_in_the_method_alone():
    grpo_file, nthr_file = (
        yaml.safe_load((RECIPES / "configs" / f"smollm2_135m_{name}.yaml").read_text(encoding="utf-8"))
        for name in ("grpo", "nthr")
    )
    assert {key for key in nthr_file if nthr_file[key] != grpo_file[key]} == {"nthr_method", "output_dir"}


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.stem)
def test_accelerate_reads_every_launch_file(path):
    config = load_config_from_file(str(path))
    kind = {"ddp": "MULTI_GPU", "ddp_cpu": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type == DistributedType(kind.get(path.stem, "NO"))
    assert config.use_cpu == path.stem.endswith("cpu")
    assert config.mixed_precision == ("no" if config.use_cpu else "bf16")


def test_the_launch_files_are_those_that_the_readme_names():
    names = {path.stem for path in LAUNCH}
    assert names == {"cpu", "single_gpu", "ddp_cpu", "ddp", "fsdp2", "zero2", "zero3"}
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert all(f"{name}.yaml" in readme for name in names)


@pytest.mark.parametrize("path", [*SCRIPTS, RECIPES / "README.md"], ids=lambda path: path.name)
def test_files_that_commands_name_exist(path):
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"recipes/[\w./]+\.(?:py|yaml)", text))
    assert len(named) >= 2
    assert not [name for name in named if not (ROOT / name).is_file()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_says_how_to_run_launch_and_resume_it(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 90
    for part in (f"python recipes/{path.name} ", "accelerate launch --config_file", "--resume_from_checkpoint"):
        assert part in text


@pytest.mark.parametrize("make_parser", PARSERS.values(), ids=PARSERS)
def test_every_flag_of_watching_is_explained_in_the_help(make_parser):
    text = make_parser().format_help()
    assert "--watch_max_overhead" in text
    assert "--learning_rate" in text


@pytest.mark.parametrize(
    ("key", "flags", "said"),
    [
        (
            "max_prompt_length: 3",
            [],
            r"^the YAML's key max_prompt_length .*did you mean max_(completion_)?length\?",
        ),
        ("watch_evry: 3", [], r"^the YAML's key watch_evry is unknown to this recipe; did you mean watch_every\?"),
        (
            "seed: 3",
            ["--watch_promts=4"],
            r"^--watch_promts=4 is unknown.*did you mean --watch_prompts\?",
        ),
        ("seed: 3", ["--qqqq", "1"], r"^--qqqq is unknown to this recipe; --help lists all"),
        ("seed: 3", ["stray"], r"^not understood: stray"),
    ],
)
@pytest.mark.parametrize("recipe", [sft, extend_sft, dpo, kto, grpo], ids=lambda recipe: recipe.__name__)
def test_an_unknown_key_or_flag_ends_the_recipe_with_the_nearest(recipe, key, flags, said, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(f"{key}\noutput_dir: x\nuse_cpu: true\nbf16: false\n")
    with pytest.raises(SystemExit) as left:
        recipe.main(["--config", str(tmp_path / "bad.yaml"), *flags])
    assert left.value.code == 2
    assert re.search(said, capsys.readouterr().err, re.MULTILINE)
