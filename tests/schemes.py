"""The schemes that every shared test runs through, each with the KLD it must stay below on the tiny model.

The bounds are about twice what was measured; they catch a scheme that stops working, not one that gets a little worse.
"""

TURBO = {
    "turbo0v0": 0.0,
    "turbo8": 3e-4,
    "turbo4": 0.05,
    "turbo3": 0.15,
    "turbo2": 0.4,
    "turbo0v4": 0.015,
    "turbo0v2": 0.2,
    "turbo4v0": 0.04,
    "turbo4v2": 0.2,
    "turbo8v3": 0.05,
    "turbo4:rotation=dense": 0.05,
    "turbo4:group=16": 0.05,
    "turbo4:center=0": 0.05,
    "turbo4:balance=0": 0.06,
    "turbo4:window=0,sinks=0": 0.05,
    "turbo4:prefill=compressed": 0.05,
    "turbo4:block=16,window=3,sinks=1,seed=5": 0.07,
}
