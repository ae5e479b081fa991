"""Packed files are unpacked piece by piece."""

import zstandard

from moejax.data import unpack


def test_a_zstd_file_is_unpacked_in_pieces_that_fit(tmp_path):
    """A frame of blocks that each repeat one byte: 4 bytes of the file are 128 KiB."""
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(bytes(400 << 20)))
    sizes = [len(chunk) for chunk in unpack._unpack_zstd(path)]
    assert sum(sizes) == 400 << 20 and max(sizes) <= 128 << 20
