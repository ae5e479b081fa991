"""A TFDS builder, as an example of bringing text of one's own: `config.data.source='tfds:tfds_sotu'`."""
