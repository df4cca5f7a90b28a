"""Operations of sequence mixers, each with several implementations. Imported as `seqmodels.kernels`."""

if __name__ == "kernels":  # by the folder's name, as old scripts in a checkout do: the same modules, no copies of them
    from seqmodels.alias import alias

    alias("kernels", "seqmodels.kernels")
