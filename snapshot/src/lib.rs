//! Capture and lazy resume of running processes. Its place in the workspace is laid out; its own issue fills it.
