"""Stored bytes of each array of a store."""

import h5py

from storage.backends import Hdf5Backend
from storage.backends.hdf5_plain import plain_dataset
from storage.reader import Store
from storage.untrusted import refuse_links


def bytes_by_array(store: Store) -> dict[str, int]:
    """Bytes that the sealed rows of each array take as they are stored, checksums included, without the records."""
    if store.members[0] is not store:  # a series
        counted = [bytes_by_array(member) for member in store.members]
        return {name: sum(sizes[name] for sizes in counted) for name in counted[0]}
    totals = {spec.name: 0 for spec in store.manifest.arrays}
    backend = store.backend
    if not isinstance(backend, Hdf5Backend):
        for shard in store.sealed_shards():
            for key, digest in store.seal(shard).objects.items():
                totals[key.split("/")[0]] += int(digest["num_bytes"])
        return totals
    parts = [backend.parts / "shards" / f"{shard:08d}.h5" for shard in store.sealed_shards()]
    for path in [backend.path] if store.finalized else parts:
        if path in parts:
            refuse_links(backend.parts, path)
        with h5py.File(path, "r", locking=False) as file:  # as the backend opens it: HDF5 wants all to agree
            for name in totals:
                totals[name] += plain_dataset(file, name, backend.path).id.get_storage_size()
    return totals
