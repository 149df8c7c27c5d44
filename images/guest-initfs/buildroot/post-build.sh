#!/bin/sh
# Called by Buildroot with the target directory: cuts the interpreter in it, by Buildroot's own python of the same version.
set -eu
exec "$HOST_DIR/bin/python3" "$BR2_EXTERNAL_TAPLOOM_PATH/cut.py" "$1"
