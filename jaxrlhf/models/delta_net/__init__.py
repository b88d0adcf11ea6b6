"""Gated delta nets: linear attention whose state is one matrix a head."""
