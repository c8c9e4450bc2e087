"""`gkd` on the host accelerator: python gemini_run.py run SPEC ..."""

from host_accelerator import install

from gkd_dsl.cli.main import main

if __name__ == "__main__":
    install()
    main()
