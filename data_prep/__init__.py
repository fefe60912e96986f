"""Raw text -> sentences -> vocabulary -> HDF5 shards: `python -m data_prep --help`."""
