"""A federation on one machine: Flower on Ray. `python simulations/fed_sim.py project.num_clients=4`."""

from typing import Any

from fl.settings import Baseline, FederatedSettings
from lab.command import entry


def run(settings: FederatedSettings, place: entry.Run) -> dict[str, Any]:
    """Run the federation, or its central baseline."""
    if settings.project.baseline is Baseline.central:
        from fl.central import train_centrally

        return train_centrally(settings, place)
    from simulations.flower import simulate

    return simulate(settings, place)


main = entry.command("fed_learn", FederatedSettings, run)

if __name__ == "__main__":
    main()
