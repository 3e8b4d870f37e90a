"""Files that appear whole or not at all, and files of others that are looked at before they are believed."""

from mlx_turboquant.files.opened import open_regular
from mlx_turboquant.files.written import written_whole

__all__ = ["open_regular", "written_whole"]
