//! What a store promises: one suite, both databases, through the traits. Rows are written and looked at by hand only
//! where no verb does.

mod notifications;
mod queue;
mod world;
