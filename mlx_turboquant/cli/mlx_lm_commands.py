"""Teach the modules behind ``mlx_lm.generate``, ``cache_prompt`` and ``chat`` the flags of this package.

Their ``main`` functions look names up in their own module when they run, so putting a wrapper behind each of a few
names is enough, and every present and future flag of mlx-lm keeps working. Nothing differs unless a flag is used.
This module is also loaded by the start-up hook, so it imports the rest of the package only when a flag is.
"""

import argparse
import functools
from types import ModuleType
from typing import Any

SCHEME_HELP = (
    "How to store the KV cache: turbo{K}v{V} with K bits per key and V per value element (0 raw, 2, 2.5, 3, 3.5, 4, "
    "8), e.g. turbo4 or turbo4v2:window=32; another method of the README's table (qjl4, outlier4, squat4, int8, "
    "affine4, mlx4, fp16); or @FILE.json from mlx_turboquant.plan."
)

_FLAGS = ("kv_scheme", "kv_report", "kv_guard", "prompt_cache_file")  # without any of them mlx-lm runs untouched


def extend_generate(module: ModuleType) -> None:
    """Give ``mlx_lm.generate`` the flags --kv-scheme and --kv-report."""
    if hasattr(module, "_turboquant_args"):
        return
    module._turboquant_args, module._turboquant_metadata, module._turboquant_report = None, {}, None
    setup, load_cache, generate = module.setup_arg_parser, module.load_prompt_cache, module.generate
    main = module.main

    @functools.wraps(setup)
    def setup_arg_parser() -> argparse.ArgumentParser:
        parser = setup()
        parser.add_argument("--kv-scheme", default=None, help=SCHEME_HELP)
        parser.add_argument("--kv-report", nargs="?", const="text", choices=("text", "json"), default=None,
                            help="Print what the KV cache holds, per layer, after generating.")  # fmt: skip
        parser.add_argument("--kv-guard", type=float, default=None, metavar="KLD",
                            help="Keep raw the layers whose compression changes the model's next-token distributions "
                            "by more than this many nats, measured on the prompt's last tokens.")  # fmt: skip
        keep_parsed(module, parser)
        return parser

    @functools.wraps(load_cache)
    def load_prompt_cache(file_name: str, return_metadata: bool = False):
        args = module._turboquant_args
        if args is None:
            return load_cache(file_name, return_metadata)
        from mlx_turboquant.prompt_cache_file import load_prompt_cache as load

        cache, metadata = load(file_name, True, kv_scheme=args.kv_scheme)
        # mlx_lm.cache_prompt writes these two, and main asks for them; a file saved from Python may lack them.
        module._turboquant_metadata = {"tokenizer_config": "{}", "model": args.model, **metadata}
        return (cache, module._turboquant_metadata) if return_metadata else cache

    @functools.wraps(generate)
    def generate_with_scheme(model: Any, tokenizer: Any, prompt: Any, **kwargs: Any) -> str:
        args, module._turboquant_args = module._turboquant_args, None  # later calls in this process are not ours
        if args is None:
            return generate(model, tokenizer, prompt, **kwargs)
        from mlx_turboquant import generation
        from mlx_turboquant.cache import link_drafts
        from mlx_turboquant.prompt_cache_file import check_model
        from mlx_turboquant.report import report

        if kwargs.get("prompt_cache") is not None:
            check_model(kwargs["prompt_cache"], module._turboquant_metadata, model, args.prompt_cache_file)
            generation.check_prompt_cache(kwargs["prompt_cache"], args.kv_scheme, kwargs.get("kv_bits"))
        else:
            kwargs["prompt_cache"] = generation.prompt_cache_for(model, args.kv_scheme or "fp16", **kwargs)
        link_drafts(kwargs["prompt_cache"], model, kwargs.get("draft_model"))
        if args.kv_guard is not None:
            if args.kv_scheme is None or args.prompt_cache_file is not None:
                raise ValueError(generation.GUARD_NEEDS)
            prompt = generation.guarded(model, tokenizer, prompt, args.kv_guard, kwargs)
        text = generate(model, tokenizer, prompt, **kwargs)
        told = report(kwargs["prompt_cache"])
        module._turboquant_report = {"text": str(told), "json": told.to_json()}.get(args.kv_report)
        return text

    @functools.wraps(main)
    def main_with_report() -> None:
        main()
        if module._turboquant_report is not None:  # after the text, which main prints itself
            print(module._turboquant_report)

    module.setup_arg_parser = setup_arg_parser
    module.load_prompt_cache = load_prompt_cache
    module.generate = generate_with_scheme
    module.main = main_with_report


def extend_cache_prompt(module: ModuleType) -> None:
    """Give ``mlx_lm.cache_prompt`` the flags --kv-scheme and --keep-raw, and a file that is written whole."""
    if hasattr(module, "_turboquant_args"):
        return
    module._turboquant_args, models = None, []
    setup, make_cache, save = module.setup_arg_parser, module.make_prompt_cache, module.save_prompt_cache

    @functools.wraps(setup)
    def setup_arg_parser() -> argparse.ArgumentParser:
        parser = setup()
        parser.add_argument("--kv-scheme", default=None, help=SCHEME_HELP)
        parser.add_argument("--keep-raw", action="store_true",
                            help="Write the prompt uncompressed; it is compressed when generation starts.")  # fmt: skip
        keep_parsed(module, parser)
        return parser

    @functools.wraps(make_cache)
    def make_prompt_cache(model: Any, max_kv_size: int | None = None) -> list[Any]:
        args = module._turboquant_args
        models[:] = [model]
        if args is None or args.kv_scheme is None:
            return make_cache(model, max_kv_size)
        from mlx_turboquant.generation import prompt_cache_for

        return prompt_cache_for(model, args.kv_scheme, max_kv_size=max_kv_size, kv_bits=args.kv_bits)

    @functools.wraps(save)
    def save_prompt_cache(file_name: str, cache: list[Any], metadata: dict[str, str] | None = None) -> None:
        args, module._turboquant_args = module._turboquant_args, None
        if args is None:
            return save(file_name, cache, metadata)
        from mlx_turboquant.prompt_cache_file import save_prompt_cache as save_whole

        for layer in cache:
            if hasattr(layer, "compress") and not args.keep_raw:
                layer.compress()
        save_whole(file_name, cache, metadata, model=models[0])

    module.setup_arg_parser = setup_arg_parser
    module.make_prompt_cache = make_prompt_cache
    module.save_prompt_cache = save_prompt_cache


def extend_chat(module: ModuleType) -> None:
    """Give ``mlx_lm.chat`` the flags --kv-scheme and --kv-report."""
    if hasattr(module, "_turboquant_args"):
        return
    module._turboquant_args, cache = None, []
    setup, make_cache, main = module.setup_arg_parser, module.make_prompt_cache, module.main

    @functools.wraps(setup)
    def setup_arg_parser() -> argparse.ArgumentParser:
        parser = setup()
        parser.add_argument("--kv-scheme", default=None, help=SCHEME_HELP)
        parser.add_argument("--kv-report", nargs="?", const="text", choices=("text", "json"), default=None,
                            help="Print what the KV cache holds, per layer, when the chat ends.")  # fmt: skip
        keep_parsed(module, parser)
        return parser

    @functools.wraps(make_cache)
    def make_prompt_cache(model: Any, max_kv_size: int | None = None) -> list[Any]:
        args = module._turboquant_args
        if args is None:
            return make_cache(model, max_kv_size)
        from mlx_turboquant.generation import prompt_cache_for

        cache[:] = prompt_cache_for(model, args.kv_scheme or "fp16", max_kv_size=max_kv_size)
        return list(cache)

    @functools.wraps(main)
    def main_with_report() -> None:
        main()
        args, module._turboquant_args = module._turboquant_args, None
        if args is not None and args.kv_report is not None:
            import mlx.core as mx

            from mlx_turboquant.report import report

            if mx.distributed.init().rank() > 0:  # rank 0 talks, as in mlx-lm
                return
            print(report(cache).to_json() if args.kv_report == "json" else report(cache))

    module.setup_arg_parser = setup_arg_parser
    module.make_prompt_cache = make_prompt_cache
    module.main = main_with_report


def keep_parsed(module: ModuleType, parser: argparse.ArgumentParser, flags: tuple[str, ...] = _FLAGS) -> None:
    """Remember what the parser parses, and refuse a scheme that does not parse before a model is loaded."""
    parse = parser.parse_args

    def parse_args(*args: Any, **kwargs: Any) -> argparse.Namespace:
        parsed = parse(*args, **kwargs)
        used = any(getattr(parsed, flag, None) is not None for flag in flags)
        if parsed.kv_scheme is not None:
            from mlx_turboquant.scheme_file import resolve

            try:
                scheme = resolve(parsed.kv_scheme)
            except (ValueError, OSError) as error:
                parser.error(str(error))
            if scheme.method != "fp16" and getattr(parsed, "kv_bits", None) is not None:
                parser.error(f"--kv-bits {parsed.kv_bits} conflicts with --kv-scheme {scheme}: leave out one")
        module._turboquant_args = parsed if used else None
        return parsed

    parser.parse_args = parse_args
