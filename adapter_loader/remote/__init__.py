"""Files that lie on other machines: asked for, downloaded, and kept on disk."""
