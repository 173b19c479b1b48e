//! The asking end of the agent channel.
