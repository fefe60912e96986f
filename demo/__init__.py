"""The whole pipeline on real text that Python packages carry: `bash launch.sh demo`."""
