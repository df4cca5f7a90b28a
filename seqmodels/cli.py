"""The command line that train.py and eval.py share: flags, configs, and one-line errors.

A script declares its flags on a `flags.FlagValues` and hands its main function to `run`. Nothing here imports JAX
before the config is read, so that `config.platform` is in time.
"""

import contextlib
import importlib.machinery
import importlib.util
import io
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from absl import flags
from ml_collections import ConfigDict, config_flags

from seqmodels import cloud, heap, job
from seqmodels.config import check_names, read_stored, upgrade, with_pattern
from seqmodels.config_help import describe
from seqmodels.errors import UserError
from seqmodels.fields.run import ROOT
from seqmodels.nearest import nearest

CONFIGS = Path(__file__).with_name("configs")
_HELP = {"--help", "-help", "-h"}


def fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted name and value of every leaf of a config, in its order."""
    for name in config:
        value = config[name]
        if isinstance(value, ConfigDict):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def builtin_configs() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(path.stem for path in _config_files(CONFIGS))


def find_config(spec: str) -> Path:
    """The file of `path/to/config.py:preset`, or of `mamba:preset`, where mamba is a config of the package.

    Raises: UserError where there is no such file.
    """
    path, _ = split_spec(spec)
    if not path.endswith(".py") and path in builtin_configs():
        return CONFIGS / f"{path}.py"
    path = os.path.expanduser(path)  # as it is where no user has that name
    try:
        is_file, is_folder = Path(path).is_file(), Path(path).is_dir() and bool(path)
    except (OSError, ValueError) as error:  # a name that no file can have
        raise UserError(f"--config={spec[:100]!r}: is no file name ({getattr(error, 'strerror', error)})") from None
    if is_file and not path.endswith(".py"):
        raise UserError(f"--config={spec}: {path} is no config, which is a Python file, *.py")
    if is_folder:
        raise UserError(f"--config={spec}: {path} is a folder; name a file in it")
    if not is_file:
        there = [str(file) for file in _config_files(Path(path).parent)] if path.endswith(".py") else []
        near = nearest(path, there) if there else nearest(Path(path).stem, builtin_configs())
        raise UserError(f"--config={spec!r}: there is no file {path!r}{near}" if not path.isprintable() or not path
                        else f"--config={spec}: there is no file {path}{near}")  # fmt: skip
    return Path(path)


def split_spec(spec: str) -> tuple[str, str]:
    """Path and preset of `path/to/config.py:preset`. The path may hold a colon."""
    ends = [match.start() for match in re.finditer(":", spec)]
    for end in (*ends, len(spec)):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # a name that no file can have
            if Path(spec[:end]).expanduser().is_file():
                return spec[:end], spec[end + 1 :]
    path, _, preset = spec.partition(":")
    return path, preset


def _config_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.py") if file.stem not in ("base", "trials", "__init__"))


def load_module(spec: str) -> ModuleType:
    """The file of `path/to/config.py:preset`, freshly run. Raises: UserError where it is missing or no config."""
    path = find_config(spec)
    loader = importlib.machinery.SourceFileLoader(f"config_{path.stem}", str(path))
    module_spec = importlib.util.spec_from_loader(loader.name, loader)
    assert module_spec is not None  # it is None only where the loader does not know the file
    module = importlib.util.module_from_spec(module_spec)
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file is a program of the user's
        raise mistake(spec, path, error) from error
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={spec}: {path} does not define get_config(preset)")
    return module


def mistake(spec: str, path: Path, error: BaseException) -> UserError:
    """What a config file raised, with the line of the file where it happened."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return UserError(f"--config={spec}: {path}:{error.lineno}: {error.msg}")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f"{path}:{lines[-1]}" if lines else str(path)
    if isinstance(error, UserError):
        return UserError(f"--config={spec}: {where}: {error}")
    # ml_collections names the fields of a group in several lines
    if near := re.search(r'Did you mean \\?"(\w+)\\?" instead of \\?"(\w+)', str(error)):
        return UserError(f"--config={spec}: {where}: no such field {near[2]}; did you mean {near[1]}?")
    if isinstance(error, AttributeError | KeyError) and (name := re.search(r"[Kk]ey \\?[\"'](\w+)", str(error))):
        return UserError(f"--config={spec}: {where}: no such field {name[1]}")
    return UserError(f"--config={spec}: {where}: {type(error).__name__}: {_one_line(error)}")


def _written_at(path: Path, error: UserError) -> str:
    """` path:line`, where a config file sets the field that an error is about; "" if no line has its name."""
    name = re.match(r"config\.([\w.]+)", str(error))
    word = re.compile(rf"\b{re.escape(name[1].split('.')[-1])}\b") if name else None
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if word and word.search(line):
            return f" {path}:{number}:"
    return ""


def written_config(spec: str) -> ConfigDict:
    """What get_config of `path/to/config.py`, `path/to/config.py:preset` or `mamba:preset` returns.

    Or the config of a run, named by its config.json.

    Raises: UserError where the file is missing or does not define get_config, or the preset is unknown.
    """
    if spec.endswith(".json"):
        try:
            return read_stored(folder_of(spec))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"--config={spec}: there is no file {spec}") from None
    module, (_, preset) = load_module(spec), split_spec(spec)
    try:
        config = module.get_config(preset) if preset else module.get_config()
    except (Exception, SystemExit) as error:
        if isinstance(error, ValueError) and "no preset" in str(error):
            raise UserError(f"--config={spec}: {_one_line(error)}") from error
        raise mistake(spec, find_config(spec), error) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={spec}: get_config returns a {type(config).__name__}; it must return a ConfigDict")
    return config


def load_config(spec: str) -> ConfigDict:
    """Config of `path/to/config.py[:preset]` or `mamba[:preset]`, locked; fields that it lacks have their defaults.

    Raises: UserError where the file is missing or does not define get_config, the preset is unknown, or the config has
    a field that is not declared.
    """
    config = written_config(spec)
    try:
        check_names(config)
        return upgrade(config).lock()
    except UserError as error:
        raise UserError(f"--config={spec}:{_written_at(find_config(spec), error)} {error}") from None


def take_config(argv: list[str]) -> str | None:
    """Takes --config=SPEC (or --config SPEC) out of the arguments; the last one counts."""
    spec, i = None, 1
    while i < len(argv):
        if match := re.match(r"--?config=(.*)", argv[i]):
            spec = match[1]
            del argv[i]
        elif re.fullmatch(r"--?config", argv[i]) and i + 1 < len(argv):
            spec = argv[i + 1]
            del argv[i : i + 2]
        else:
            i += 1
    return spec


def define_config(flag_values: flags.FlagValues, argv: list[str]) -> None:
    """Takes --config=FILE[:preset] out of `argv` and declares a flag --config.field for each field of that config.

    Raises: UserError for a config or a field that is not there.
    """
    spec = take_config(argv)
    if spec is None and not _HELP & set(argv):
        raise UserError("--config is missing; for example --config=configs/densemamba.py")
    if spec is None:
        flags.DEFINE_string(
            "config",
            None,
            "Config, as configs/mamba.py or configs/mamba.py:130m; or mamba:130m.",
            flag_values=flag_values,
        )
        return
    config = load_config(spec)
    if (pattern := _override(argv, "model.pattern")) is not None:
        config = with_pattern(config, pattern).lock()  # so that the options of its branches can be set too
    check_overrides(config, argv)
    config_flags.DEFINE_config_dict("config", config, f"Read from {spec}.", flag_values=flag_values, sys_argv=argv)


def _override(argv: list[str], field: str) -> str | None:
    """The value that the arguments give to a field: the last one, or None."""
    value = None
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        match = re.fullmatch(rf"--?config\.{re.escape(field)}(?:=(.*))?", argument, re.DOTALL)
        if match:
            value = following if match[1] is None else match[1]
    return value


def check_overrides(config: ConfigDict, argv: list[str]) -> None:
    """Raises UserError for the first `--config.field=value` whose field the config does not have."""
    names = [name for name, _ in fields(config)]
    for argument in argv:
        match = re.match(r"--?(no)?config\.([^=]*)", argument)
        if match and match[2] not in names:
            name = match[2]
            inside = [other for other in names if other.startswith(name + ".")]
            if inside:
                raise UserError(f"--config.{name} is a group of fields; set one of {', '.join(inside)}")
            raise UserError(f"--config.{name}: no such field{nearest(name, names)}")


def use_platform(platform: str) -> None:
    """Makes JAX use this platform ("" leaves it alone). Before the first JAX computation.

    Raises: UserError where there is no such device.
    """
    import jax

    ROOT.fields["platform"].check("platform", platform)
    if platform:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(platform, platform))
    heap.keep_freed_memory()  # before JAX makes its threads; commands have said so already, other programs have not
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where there is not even a plugin for it
        found = _one_line(error) or "is the JAX for it installed?"
        raise UserError(f"--config.platform={platform}: JAX finds no such device here: {found}") from error
    local = jax.local_devices()
    heap.keep_freed_memory(local[0].platform == "cpu")
    job.current().agree("the devices", {"devices": f"{len(local)} x {local[0].device_kind}"})


def define_distributed(flag_values: flags.FlagValues) -> None:
    """Declares the flag of `joined`."""
    text = "This is one process of a job of several, each running this command (docs/processes.md)."
    flags.DEFINE_bool("distributed", False, text, flag_values=flag_values)


@contextlib.contextmanager
def joined(flag_values: flags.FlagValues) -> Iterator[None]:
    """A context in which this process is one of a job of several, with --distributed; before the first JAX computation.

    Raises: UserError where JAX does not find the others, or another process has another command, code or version.
    """
    if not flag_values.distributed:
        yield
        return
    from seqmodels import cluster

    cluster.connect()
    with job.member() as here:
        here.agree("the command", cluster.versions() | _given(flag_values))
        yield


def _given(flag_values: flags.FlagValues) -> dict[str, str]:
    """The value of each flag and of each field of the config, by name."""
    given = {name: flag_values[name].value for name in flag_values if "." not in name}
    config = given.pop("config", None)
    inside = {f"config.{name}": value for name, value in fields(config)} if isinstance(config, ConfigDict) else {}
    return {name: repr(value) for name, value in {**given, **inside}.items()}


def help_text(doc: str, flag_values: flags.FlagValues) -> str:
    """What `--help` prints: the script's docstring, its flags, and the fields of the config named beside it."""
    lines = [doc.strip(), "", "Flags:"]
    for name in sorted(flag_values):
        flag = flag_values[name]
        if "." not in name and flag.help != "(no help available)":
            default = "" if flag.default in (None, "", []) or name == "config" else f" (default: {flag.default})"
            lines.append(f"  --{name}: {flag.help}{default}")
    config = flag_values["config"].default if "config" in flag_values else None
    if isinstance(config, ConfigDict):
        lines += ["", "Fields of the config, with their values here, what they mean, and what else is allowed:"]
        lines += describe(config, shutil.get_terminal_size().columns)
    elif "config" in flag_values:
        lines += ["", "Add --config=FILE to see the fields of that config and what they mean."]
    return "\n".join(lines)


def run(
    main: Callable[[flags.FlagValues], int | None],
    define: Callable[[flags.FlagValues, list[str]], None],
    doc: str,
    argv: list[str] | None = None,
) -> int:
    """Parses the flags, calls `main` with them, and returns the exit status.

    Args:
      main: the script's work; returns an exit status, None for 0.
      define: declares the script's flags, given where to declare them and the arguments.
      doc: the text of --help.
      argv: program name and arguments; sys.argv if None.

    A UserError, any mistake in the flags, and a file that the system refuses is one line on stderr and status 1.
    """
    argv = list(sys.argv if argv is None else argv)
    # Scripts are quiet unless something is wrong; must be set before JAX's libraries are loaded.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character of a sample gets its code
            stream.reconfigure(errors="backslashreplace")
    flag_values = flags.FlagValues()
    try:
        define(flag_values, argv)
        if _HELP & set(argv):
            print(help_text(doc, flag_values))
            return 0
        rest = flag_values(argv)[1:]
        if rest:
            raise UserError(f"{rest[0]}: not a flag; options are written --name=value")
        return main(flag_values) or 0
    except (UserError, flags.Error) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
        return 1
    except BrokenPipeError:  # `train.py ... | head`
        with contextlib.suppress(OSError, ValueError):  # or Python says at its end that it cannot flush
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:  # where `interrupt.install` was not called
        print("SIGINT: stopped", file=sys.stderr, flush=True)
        return 130


def folder_of(path: str) -> Path:
    """A path of the command line, in which `~` is the home directory. Raises: UserError where nobody knows that, or for
    the address of a cloud, which would become a local folder."""
    if cloud.is_cloud(path):
        raise UserError(f"{path}: must be a folder here; only run directories of train.py and eval.py, and texts, may "
                        "be in a cloud (docs/howto.md)")  # fmt: skip
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {_one_line(error)}") from error


@contextlib.contextmanager
def run_folder(path: str) -> Iterator[Path]:
    """The folder of a run directory; of one in a cloud a copy, of which what is new is sent there at the end.

    Raises: UserError as `folder_of`, or where the cloud cannot be reached.
    """
    if not cloud.is_cloud(path):
        yield folder_of(path)
        return
    with cloud.copied(path) as copy:
        yield copy.folder
        copy.send()


def check_writable(out: Path) -> None:
    """Raises UserError if a file cannot be written, as far as the system says without writing it."""
    try:
        folder = next(folder for folder in (out.parent, *out.absolute().parents) if folder.exists())
        reason = "is a folder" if out.is_dir() else ""
        if not folder.is_dir() or not os.access(out if out.exists() else folder, os.W_OK):
            reason = reason or "cannot be written"
    except (OSError, ValueError) as error:  # a name that no file can have
        reason = f"is no file name ({getattr(error, 'strerror', error)})"
    if reason:
        raise UserError(f"--out={str(out)[:200]}: {reason}; name another file")


def _one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split())
