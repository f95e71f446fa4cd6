"""The runs in configs/, and the modules beside them as a run imports them."""

from pathlib import Path
from types import ModuleType

from shardmap.jobs import modules
from shardmap.jobs.config import load

CONFIGS = Path(__file__).parents[2] / "configs"


def module(run: str, name: str) -> ModuleType:
    """A module that the configuration of this name can name."""
    return modules.import_module(name, [Path(folder) for folder in load(CONFIGS / run).python])


digits = module("digits_gradients", "digits")
digits_reports = module("digits_gradients", "reports")
lorenz = module("lorenz96_lyapunov", "lorenz")
lorenz_reports = module("lorenz96_lyapunov", "reports")
ntk = module("ntk_cnn", "ntk")
ntk_reports = module("ntk_cnn", "reports")
potential = module("potential_hessian", "potential")
private_reports = module("dp_sgd_sums", "reports")
text = module("ragged_text", "text")
text_reports = module("ragged_text", "reports")
input_jacobian = module("digits_jacobian", "jacobian").input_jacobian
