"""GLM-5's maths and modules. Nothing here patches anything."""
