"""Measure what has been trained: `lm` says what a language model knows, `pairs` what it prefers,
`generation` how what is made compares with what is real, `long` whether it lasts; `codec`
reconstructs clips, `semantic` compares tokenizers, `resynthesis` says semantic tokens anew. Each is
in a file of its name."""

from scripts.cli import add_command, make_parser, run_cli
from scripts.evaluate_codec import add_codec_options
from scripts.evaluate_generation import add_generation_options
from scripts.evaluate_lm import add_lm_options
from scripts.evaluate_long import add_long_options
from scripts.evaluate_pairs import add_pairs_options
from scripts.evaluate_resynthesis import add_resynthesis_options
from scripts.evaluate_semantic import add_semantic_options

EXAMPLES = """\
  python -m scripts.evaluate lm runs/semantic
  python -m scripts.evaluate lm runs/coarse --plot runs/coarse.svg --out runs/coarse.json
  python -m scripts.evaluate pairs runs/semantic
  python -m scripts.evaluate pairs runs/semantic zerospeech/lexical/dev/gold.csv
  python -m scripts.evaluate generation --semantic runs/a --coarse runs/b --fine runs/c \\
      --audio DIR --limit 40 --wavs runs/heard --out runs/generation.json
  python -m scripts.evaluate long DIR_OF_LONG_CLIPS --audio DIR --plot runs/voice.svg
  python -m scripts.evaluate codec --codec pretrained/codec_16khz --audio DIR --limit 20
  python -m scripts.evaluate codec --codec pretrained/codec_16khz \\
      --audio ../shared/corpus/manifest.jsonl --split test --out runs/codec_test.json
  python -m scripts.evaluate codec --codec pretrained/codec_16khz \\
      --audio ../shared/corpus/manifest.jsonl --num-codebooks 1 2 4 8 --by folder \\
      --asr models/whisper-base --picture runs/codec_test.png
  python -m scripts.evaluate codec --codec encodec_24khz --num-codebooks 2 4 8 \\
      --audio ../shared/corpus/manifest.jsonl --match librispeech --limit 40
  python -m scripts.evaluate semantic --tokenizers pretrained/semantic_mfcc runs/semantic_mine \\
      --audio ../shared/corpus/manifest.jsonl --split test --out runs/semantic_test.json
  python -m scripts.evaluate resynthesis --acoustic runs/acoustic --asr models/whisper-base \\
      --audio ../shared/corpus/manifest.jsonl --match librispeech --wavs runs/resynthesis"""


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("Measure a trained part on recordings.", EXAMPLES)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, about, add_options in (
        ("lm", "a language model beside uniform, unigram, bigram; is it working?", add_lm_options),
        ("pairs", "which of two a model finds likelier; sWUGGY and others", add_pairs_options),
        ("generation", "clips made, as sets beside real ones", add_generation_options),
        ("long", "clips of minutes, piece by piece: voice, silence, level", add_long_options),
        ("codec", "reconstruction: PESQ, STOI, SI-SDR, speaker, WER, speed", add_codec_options),
        ("semantic", "semantic tokenizers side by side", add_semantic_options),
        ("resynthesis", "semantic tokens to sound again: WER, speaker", add_resynthesis_options),
    ):
        add_options(add_command(commands, EXAMPLES, name, about))
    parsed = parser.parse_args(arguments)
    parsed.run(parsed)


if __name__ == "__main__":
    run_cli(main)
