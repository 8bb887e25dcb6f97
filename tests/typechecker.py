"""The check of annotations while tests run; an int is accepted where a float is, as type checkers do."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
