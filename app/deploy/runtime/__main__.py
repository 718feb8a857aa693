"""`python -m app.deploy.runtime DIR --input IMAGES --output DIR`."""

from app.deploy.runtime.cli import main

main()
