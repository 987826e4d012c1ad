"""``python -m thanos`` is the ``thanos`` command."""

from thanos.cli import main

if __name__ == "__main__":
    main()
