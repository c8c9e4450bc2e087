"""The backend that a plan names."""

from __future__ import annotations

from gkd_dsl.graph.plan import SpecPlan
from gkd_dsl.runtime.backends.base import Backend, Settings
from gkd_dsl.runtime.processes import Processes


def make_backend(plan: SpecPlan) -> Backend:
    """The backend of a plan, which has met the other processes of the run where there are any.

    A spec for `local` that a launcher starts in several processes is run as by `ddp`. Raises RunError.
    """
    processes, settings = Processes.here(), Settings.of(plan.runtime)
    if plan.backend == "local" and processes.count == 1:
        from gkd_dsl.runtime.backends.local import LocalBackend

        return LocalBackend(settings)
    if plan.backend in ("local", "ddp"):
        from gkd_dsl.runtime.backends.ddp import DdpBackend

        return DdpBackend(settings, processes)
    from gkd_dsl.runtime.backends.gemini import GeminiBackend, plugin_arguments

    return GeminiBackend(settings, processes, plugin_arguments(plan.runtime))
