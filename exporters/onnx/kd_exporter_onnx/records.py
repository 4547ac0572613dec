"""On which providers an artefact may run here: verified at export, or by `kd-verify` on this machine."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from kd_exporter_onnx import providers
from kd_exporter_onnx.artefact import MANIFEST, Artefact, Provider, sha256
from kd_exporter_onnx.errors import ArtefactError


class Record(BaseModel):
    """What `kd-verify` writes beside the manifest; holds for this manifest, runtime and architecture."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    manifest: str
    provider: Provider
    tf32: bool
    machine: dict[str, str]
    tolerance: float
    differences: dict[str, float]
    placement: dict[str, dict[str, int]]


def path_of(folder: Path, provider: Provider, *, tf32: bool = False) -> Path:
    return folder / f"verified-{provider}{'-tf32' if tf32 else ''}.json"


def verified(folder: Path, artefact: Artefact, provider: Provider, *, tf32: bool = False) -> bool:
    """The CPU always is: no export ships without it. TF32 needs a record of its own."""
    if provider in artefact.verified and (provider == "cpu" or not tf32):
        return True
    path = path_of(folder, provider, tf32=tf32)
    if not path.is_file():
        return False
    try:
        record = Record.model_validate_json(path.read_text())
    except ValidationError:
        return False
    same = record.manifest == sha256(folder / MANIFEST) and record.machine == providers.machine()
    return same and record.provider == provider and record.tf32 == tf32


def require(folder: Path, artefact: Artefact, provider: Provider, *, tf32: bool = False) -> None:
    if not verified(folder, artefact, provider, tf32=tf32):
        flag = " --tf32" if tf32 else ""
        raise ArtefactError(
            f"{artefact.name} was not verified on {provider}{' with TF32' if tf32 else ''} with this "
            f"runtime: run `kd-verify {folder} --provider {provider}{flag}` on this machine first"
        )
