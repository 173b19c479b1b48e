//! Snapshot, resume and fork of User Mode Linux machines. Its place in the workspace is laid out; its own issue fills it.
