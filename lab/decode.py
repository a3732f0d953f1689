"""What a token costs in a whole model on this machine: `python -m lab.decode project.context=1024`."""

from __future__ import annotations

from typing import Any

from lab.command import entry
from lab.decode_settings import DecodeSettings


def run(settings: DecodeSettings, place: entry.Run) -> dict[str, Any]:
    """Times full windows; the figures of the last line."""
    # Here, because torch reads some of what `entry.main` puts into the environment when it is loaded.
    from lab.decoding import decode
    from lab.device import open_device, read_memory
    from lab.engine.base import LocalEngine
    from lab.engine.kv import CacheFull
    from lab.models.layers import load_proved
    from lab.settings import UserError
    from lab.tracking import Tracker

    project, device = settings.project, open_device(settings.device)
    model = load_proved(settings.model, device).model
    if settings.model.adapter is not None:
        from lab.models.adapter import add_adapter  # loads PEFT, which plain models can do without

        add_adapter(model, settings.model)
    with Tracker(settings, "decode", place.folder) as tracker:
        try:
            engine = LocalEngine(
                model,
                sessions=project.sessions,
                context=project.context,
                bucket=project.cache_bucket,
                kv_limit_bytes=project.cache_limit_bytes,
                prefill_chunk=project.prefill_chunk,
                exact_rows=None,
            )
            figures = decode(
                engine,
                context=project.context,
                sessions=project.sessions,
                new_tokens=project.max_new_tokens,
            )
        except CacheFull as full:
            raise UserError(f"project.cache_limit_bytes must have room for these texts: {full}") from None
        except UserError:
            raise
        except ValueError as error:  # a context that the model was not made for
            raise UserError(f"project.{error}") from None
        memory = read_memory(device)
        figures |= {"peak_rss_bytes": memory.peak_rss_bytes, "peak_device_bytes": memory.device_peak_bytes}
        tracker.result(figures)
    return figures


def main() -> None:
    """Composes `conf/decode.yaml` and runs."""
    entry.main("decode", DecodeSettings, run)


if __name__ == "__main__":
    main()
