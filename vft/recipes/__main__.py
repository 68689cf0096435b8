"""`python -m vft.recipes TASK CONFIG.toml`: see `vft.recipes.main`."""

from vft.recipes.main import main

if __name__ == "__main__":
    main()
