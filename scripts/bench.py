"""How fast, and beside what: `attend` one attention call, `train` a step of a recipe, `data` its
loader, `learn` what its variants learn over steps and seconds, `scale` steps on several processes,
`sample` the stages of sampling; `curve` what runs have learned; `readme` puts all that into the
README and docs/RESULTS.md. Each is in a file of its name."""

from scripts.bench_attend import add_attend_options
from scripts.bench_curve import add_curve_options
from scripts.bench_data import add_data_options
from scripts.bench_learn import add_learn_options
from scripts.bench_readme import add_readme_options
from scripts.bench_sample import add_sample_options
from scripts.bench_scale import add_scale_options
from scripts.bench_train import add_train_options
from scripts.cli import add_command, make_parser, run_cli

EXAMPLES = """\
  python -m scripts.bench attend --out benchmarks/attend.json
  python -m scripts.bench attend --batch 2 --heads 4 --length 256 --device cpu
  python -m scripts.bench train --config configs/coarse_270m.yaml --out benchmarks/train.json
  python -m scripts.bench train --config configs/coarse_small.yaml data.tokens=tokens/mine \\
      --compare "fp32: train.precision=fp32" "no dropout: model.dropout=0"
  python -m scripts.bench sample --config configs/demo_semantic.yaml configs/demo_coarse.yaml \\
      configs/demo_fine.yaml --batch 1 4 --seconds 2
  accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 2 \\
      -m scripts.bench train --config configs/coarse_270m.yaml train.batch_size=32
  python -m scripts.bench scale --config configs/coarse_270m.yaml --processes 2 --steps 200
  python -m scripts.bench data --config configs/coarse_small.yaml data.tokens=tokens/mine
  python -m scripts.bench learn --config configs/coarse_small.yaml data.tokens=tokens/mine \\
      --compare "AdamW: optim.muon_lr=0" --seeds 0 1 2 --plot muon.svg --out muon.json
  python -m scripts.bench curve runs/semantic runs/coarse --out curves.json"""


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("Measure speed and memory, beside a baseline in the same run.", EXAMPLES)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    pages = "benchmarks/*.json as tables of README.md and docs/RESULTS.md"
    for name, about, add_options in (
        ("attend", "features of attention x backends", add_attend_options),
        ("train", "training steps of a recipe", add_train_options),
        ("data", "the loader of a recipe", add_data_options),
        ("learn", "validation losses of variants, by seeds", add_learn_options),
        ("scale", "a recipe's steps on one and several processes", add_scale_options),
        ("sample", "steps of stages, all stages in a row", add_sample_options),
        ("curve", "validation losses of runs", add_curve_options),
        ("readme", pages, add_readme_options),
    ):
        add_options(add_command(commands, EXAMPLES, name, about))
    parsed = parser.parse_args(arguments)
    parsed.run(parsed)


if __name__ == "__main__":
    run_cli(main)
