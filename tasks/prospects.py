"""How likely a set of photos is accepted with the settings in force: asked before anything is kept or trained."""

from __future__ import annotations

from likeness.acceptance import Estimate
from models.diffusion import bases
from models.faces.photos import Inspection
from models.quality import prospects
from tasks.runtime import Tools


def expect(tools: Tools, found: Inspection) -> tuple[Estimate | None, str]:
    """(estimate, words): None where the set is refused or nobody measured these settings; the words say which."""
    if found.set.verdict != "ok":
        return None, "no estimate of acceptance: the set cannot be used as it is"
    settings = tools.settings
    trials = prospects.trials_for(settings, tools.faces.recogniser_name)
    base = bases.load(settings.base, folder=tools.base_folder) if trials is not None else None       # not the run's own, which is noted in the store
    if trials is None or base is None or base.ref.revision != trials.revision:
        return None, (f"no estimate of acceptance: base {settings.base!r} with this recipe, gate, battery and recogniser was not measured "
                      "(`python -m bench.acceptance` in a checkout measures it)")
    if len(found.accepted) < 2:
        return None, "no estimate of acceptance: of one photo nothing can be said"
    known = prospects.prospect_of(base, found.accepted, tools.faces)
    if known is None:
        return None, "no estimate of acceptance: after the base's own autoencoder no face is found in these photos, so hardly any training can succeed"
    estimate = prospects.estimate(trials, known)
    return estimate, estimate.words
