from lorakeet.cli import script

script()
