//! Migrations are embedded: a new file among them is a reason to build again, which `cargo` does not see by itself.

fn main() {
    println!("cargo::rerun-if-changed=migrations");
}
