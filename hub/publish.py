"""`python -m hub.publish RUN --output DIR`, as `timm-depla publish`."""

from timm_depla.commands import run_command
from timm_depla.hub.publish import main

if __name__ == '__main__':
    run_command('hub.publish', main)
