"""What all formats share: files of records, keys, paths of media, options, labels. A data set is in `formats/`."""
