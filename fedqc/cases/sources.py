"""Volumes that are read when they are needed, wherever they are: in files, or as arrays in memory."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedqc.cases.volumes import Header, Volume, read_header, read_volume, voxel_size


@dataclass(frozen=True, eq=False)
class Source:
    """A volume of a case."""

    path: Path
    """Of the file; of an array what it is called in messages."""
    held: Volume | None = None
    """The array and where it lies, where there is no file."""

    def header(self) -> Header:
        """What is known of the volume before a voxel is read.

        Raises:
            DataError: the file is missing or no volume.
        """
        if self.held is None:
            return read_header(self.path)
        affine, shape = self.held.affine, self.held.data.shape
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        x, y, z = (float(side) for side in voxel_size(affine))
        return Header(shape, affine, pixdim=(x, y, z), qform=None, sform=affine, unit=None)

    def volume(self) -> Volume:
        """The volume, its trailing sides of length 1 dropped; the array itself where there is no file.

        Raises:
            DataError: the file is missing or damaged.
        """
        if self.held is None:
            return read_volume(self.path)
        return Volume(np.asarray(self.held.data).reshape(self.header().shape), self.held.affine)
