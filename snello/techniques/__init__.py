"""The techniques at a glance: one small folder or file each, all of one shape (`base.Technique`), named in `table`."""
