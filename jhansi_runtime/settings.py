"""The settings file, $JHANSI_CONFIG: TOML, every key optional (spec.Settings says which there are)."""

from jhansi_runtime.errors import InvalidRequestError
from jhansi_runtime.spec import Settings, from_builtins

__all__ = ["load"]


def load(path: str) -> Settings:
    """Return the settings in the file; the defaults when there is none. InvalidRequestError: it is unfit."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed by the statement below, which must not catch what opening raises
    except FileNotFoundError:
        return Settings()
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}", remedy="see JHANSI_CONFIG") from None
    import tomllib  # noqa: PLC0415 - 20 ms, and most installations have no settings file

    with file:
        try:
            content = tomllib.load(file)
        except (ValueError, RecursionError) as error:  # TOML's, Unicode's, or that of an endless number
            raise InvalidRequestError(f"{path} is not TOML: {error}", remedy="mend the file, or remove it") from error
    return from_builtins(content, Settings, where=path)
