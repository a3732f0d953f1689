"""The Flower app of a client: takes a message, lets a LoRAClient work, returns a message.

In a simulation the settings come with the app (`make_client_app`); in a deployment `app` composes them from the run's
configuration (`config-name`, `overrides`), and the node's own `--node-config` names its data.

An error leaves a site as one line without any of the site's text; Flower itself would send the exception's whole text.
"""

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl.client import LoRAClient, Site, open_client
from fl.compression.site import SiteLink
from fl.messages import CONFIG, DATA, EVALUATE, METRICS, PARTITION, SERVER_ROUND, WEIGHT
from fl.settings import FederatedSettings, Share
from lab.command.ending import disk_full
from lab.command.entry import compose_settings, log_to_stderr
from lab.device import forget_peak_rss
from lab.files import whole_folder, whose_place
from lab.learning.examples import MalformedData
from lab.learning.training import Diverged
from lab.models.adapter import write_adapter
from lab.models.base_model import base_name
from lab.models.lora import lora_config
from lab.models.sources import model_identity
from lab.settings import UserError

log = logging.getLogger(__name__)

MAX_LOGGED = 100
"""Most malformed lines that a site's log names."""

CLIENT_APP_RAISED = 2  # flwr.common.constant.ErrorCode


def make_client_app(settings_of: Callable[[Context], FederatedSettings]) -> ClientApp:
    """A ClientApp that answers train, evaluate and query messages with settings from `settings_of`."""
    client_app = ClientApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        def answer() -> Message:
            forget_peak_rss()
            settings = settings_of(context)
            with site_places(settings):
                return answer_train(message, open_client(settings, site_of(context)))

        return guarded(message, answer)

    @client_app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        def answer() -> Message:
            settings = settings_of(context)
            with site_places(settings):
                return answer_evaluate(message, open_client(settings, site_of(context)), settings)

        return guarded(message, answer)

    @client_app.query()
    def query(message: Message, context: Context) -> Message:
        return guarded(message, lambda: answer_query(message, site_of(context)))

    return client_app


def guarded(message: Message, answer: Callable[[], Message]) -> Message:
    """The reply of `answer`; if it raises, an error reply that holds none of the site's text.

    The message of one of our own errors travels: it names files, rules and figures. Any other error could quote the
    data, so only its type and place travel. Only the site's own log names malformed lines.
    """
    try:
        return answer()
    except MalformedData as error:
        reason = f"{error.summary} (named in the site's own log)"
        for line in error.reasons[:MAX_LOGGED]:
            log.error("%s", line)
    except (UserError, Diverged) as error:
        reason = " ".join(str(error).split())
    except Exception as error:  # the only place that can keep the site's text out of it
        frames = traceback.extract_tb(error.__traceback__)
        reason = f"{type(error).__name__} in {frames[-1].name} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
        if disk_full(error):
            reason = f"the site's disk is full: {reason}"
        log.error("%s\n%s", reason, "".join(traceback.format_list(frames)))
    return Message(Error(CLIENT_APP_RAISED, reason), reply_to=message)


@contextmanager
def site_places(settings: FederatedSettings) -> Iterator[None]:
    """Within the block, a folder of the site that cannot be used is a UserError with its key."""
    try:
        yield
    except OSError as error:
        places = {"project.site_folder": settings.project.site_folder, "model.cache_dir": settings.model.cache_dir}
        raise (None if disk_full(error) else whose_place(error, places)) or error from None


def answer_train(message: Message, client: LoRAClient) -> Message:
    """Evaluate the received adapter, train it, and reply with both."""
    link = link_of(message, client)
    client.load(link.received)
    about = site_records(client)
    server_round = int(str(message.content.config_records[CONFIG][SERVER_ROUND]))
    adapter, figures = client.train(server_round)
    content = link.reply(adapter, server_round)
    content[METRICS] = MetricRecord(
        {
            PARTITION: client.site.index,
            WEIGHT: client.weight(client.split.train),
            "train_loss": figures.loss,
            "train_tokens": figures.tokens,
            "train_seconds": figures.seconds,
            "gradient_norm": figures.gradient_norm,
            "peak_rss_bytes": client.peak_rss_bytes(),
        }
    )
    content.update(about)
    return Message(content, reply_to=message)


def answer_evaluate(message: Message, client: LoRAClient, settings: FederatedSettings) -> Message:
    """Evaluate the received adapter. A site that keeps a part to itself leaves the whole in a folder of its own."""
    link = link_of(message, client)
    client.load(link.received)
    if client.project.share is not Share.both:
        with whole_folder(link.folder / f"site-{client.site.index}-adapter") as folder:
            lora = lora_config(settings.model.lora_targets, client.project.lora)  # the scale in which B travels
            name, identity = base_name(settings.model), model_identity(settings.model)
            write_adapter(folder, lora, link.received, name, identity, site=client.site.index)
    metrics = MetricRecord({PARTITION: client.site.index})
    return Message(RecordDict({METRICS: metrics, **site_records(client)}), reply_to=message)


def link_of(message: Message, client: LoRAClient) -> SiteLink:
    """The adapter of a message, and the way back."""
    return SiteLink(client.project, client.site.index, message.content)


def answer_query(message: Message, site: Site) -> Message:
    """Reply with the site's number."""
    return Message(RecordDict({METRICS: MetricRecord({PARTITION: site.index})}), reply_to=message)


def site_records(client: LoRAClient) -> dict[str, MetricRecord]:
    """Counts of the site's lines and, if it has a held-out part, the loss of the loaded adapter on it."""
    records = {DATA: MetricRecord(asdict(client.split.counts))}
    if client.split.held_out:
        begin = time.perf_counter()
        figures = {"eval_loss": client.evaluate(), "eval_seconds": time.perf_counter() - begin}
        records[EVALUATE] = MetricRecord({WEIGHT: client.weight(client.split.held_out), **figures})
    return records


def site_of(context: Context) -> Site:
    """A node's site: `partition-id`, and `data-path` if the node has its own file."""
    index, path = context.node_config.get("partition-id"), context.node_config.get("data-path")
    if not isinstance(index, int) or index < 0:
        raise UserError(f"partition-id of --node-config must be a whole number from 0 on, got {index!r}")
    return Site(index, None if path is None else str(path))


def settings_from_run(context: Context) -> FederatedSettings:
    """Settings from `flwr run --run-config`: a config name and a string of Hydra overrides."""
    overrides = str(context.run_config.get("overrides", ""))
    return compose_settings(str(context.run_config["config-name"]), overrides, FederatedSettings)


def log_beside_flower() -> None:
    """Log to stderr in a process that Flower started; Flower's own logger prints its records itself."""
    log_to_stderr()
    logging.getLogger("flwr").propagate = False


def deployed(context: Context) -> FederatedSettings:
    """Settings in a process that a SuperNode started for one message."""
    log_beside_flower()
    return settings_from_run(context)


app = make_client_app(deployed)
