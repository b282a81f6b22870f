"""One question about images or videos: ``python -m llava.eval.run_llava``."""

from libra.utils.cli import Parser, whole_from

from ..serve.options import add_options

EXAMPLES = """example:
  python -m llava.eval.run_llava --model-path mini/checkpoint --image-file photo.png \\
      --query "how many digits are there ?"
  python -m llava.eval.run_llava --model-path liuhaotian/llava-v1.5-7b --image-file a.png,b.png \\
      --query "What differs?" --compression configs/llava7b_r50.yaml"""


def eval_model(args) -> str:
    """Print and return the answer to ``args.query``.

    Args:
        args: any object with the attributes ``model_path``, ``query`` and ``image_file`` or ``video_file``;
            the others of the command line, under the original's names, may be missing: ``model_base,
            conv_mode, sep, temperature, top_p, num_beams, max_new_tokens, compression, device, load_8bit,
            load_4bit``.

    Raises:
        ValueError: if there is nothing to show, or something of it, a compression file, a template, the query
            or the checkpoint cannot be used.
    """
    from ..serve.session import Session

    if not (getattr(args, "image_file", None) or getattr(args, "video_file", None)):
        raise ValueError("there is nothing to look at; give --image-file or --video-file")
    names = ("temperature", "top_p", "num_beams", "max_new_tokens")
    answer = Session.load(args).ask(
        args.query, **{name: getattr(args, name) for name in names if hasattr(args, name)}
    )
    print(answer.text)
    return answer.text


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        takes_plugins=True,
        prog="python -m llava.eval.run_llava",
        description="Answer one question about images or videos.",
        epilog=EXAMPLES,
    )
    add_options(parser)
    parser.add_argument(
        "--query", required=True, help="the question; <image-placeholder> in it says where an image goes"
    )
    parser.add_argument(
        "--num-beams", "--num_beams", type=whole_from(1), default=1, help="beams of the search (default 1)"
    )
    args = parser.parse_args(argv)
    try:
        eval_model(args)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
