"""Fields of a config by names with two underscores for a dot, as keyword arguments have them."""


def with_fields(config, overrides):
    """The config, unlocked, in which `model__width` and the like have these values."""
    for name, value in overrides.items():
        *groups, last = name.split("__")
        holder = config
        for group in groups:
            holder = holder[group]
        holder[last] = value
    return config
