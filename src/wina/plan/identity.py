"""Which model a calibration or a plan belongs to."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from wina.errors import WinaError


class ModelIdentity(BaseModel):
    """The base model, by name for people and by hash for checks.

    ``config_hash`` and ``weights_hash`` are SHA-256 digests made by ``wina.models.identity``;
    docs/plans.md says of what.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    revision: str | None = None
    config_hash: str
    weights_hash: str
    dtype: str

    def check(self, found: ModelIdentity) -> None:
        """Raise WinaError unless ``found`` is this model."""
        if found.config_hash != self.config_hash:
            what = "another architecture or size (their configs differ)"
        elif found.weights_hash != self.weights_hash:
            what = "the same architecture with other weights"
        else:
            return
        if found.name == self.name:
            raise WinaError(
                f"this was made for {self.name!r}, and the model here is {what}: an adapter merged "
                "into it, training, or another revision. Calibrate the model as it is and plan "
                "again, or load it as it was."
            )
        raise WinaError(
            f"this was made for {self.name!r}, and {found.name!r} is {what}. "
            f"Load {self.name!r}, or calibrate {found.name!r} and plan again."
        )
