"""Two sites train one adapter, and only the adapter leaves a site. `python examples/federated.py`"""

import sys

from fl.adapters import AdapterIndex, PackedAdapter
from fl.aggregation.exact import ExactMean
from fl.client import Site, open_client
from fl.server import first_adapter
from fl.settings import FederatedSettings, WireDtype
from lab.command.entry import compose_settings

OVERRIDES = ["project.num_clients=2", "project.local_steps=4", "project.data.max_held_out=8", "model.quantization=none"]
settings = compose_settings("fed_learn", [*OVERRIDES, *sys.argv[1:]], FederatedSettings)
clients = [open_client(settings, Site(number)) for number in range(settings.project.num_clients)]
adapter = first_adapter(settings)
index = AdapterIndex.of(adapter, WireDtype.float32)
for server_round in range(1, settings.project.rounds + 1):
    mean, losses = ExactMean(index.size), []
    for client in clients:
        client.load(adapter)
        losses.append(client.evaluate())  # of the adapter that it received, on text it never trains on
        trained, _ = client.train(server_round)
        mean.fold(PackedAdapter.pack(trained, index).to_float32(), client.weight(client.split.train))
    adapter = PackedAdapter.from_float32(mean.mean(), index).unpack()
    print(f"round {server_round}: held-out losses of the sites {', '.join(f'{loss:.4f}' for loss in losses)}")
for client in clients:
    client.load(adapter)
    print(f"site {client.site.index} afterwards: {client.evaluate():.4f}")
