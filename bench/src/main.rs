//! Measurements of the built binary: how long a deployment takes, what the platform weighs, how fast
//! the ingress is. Where there is a peer, both are measured in one run, turn by turn, and the ratio of
//! the medians is printed. Words given pick measurements by their names.

mod deployments;
mod ingress;
mod memory;
mod plans;
mod sample;
mod spine;

/// A measurement: its name, and the lines it prints.
type Measurement = (&'static str, fn() -> Vec<String>);

const ALL: [Measurement; 9] = [
    ("plan", plans::measure),
    ("rebuild", plans::rebuild),
    ("deploy", deployments::measure),
    ("memory", memory::measure),
    ("size", memory::size),
    ("ingress", ingress::measure),
    ("bus", spine::bus),
    ("relay", spine::relay),
    ("shapes", spine::shapes),
];

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    for (name, measure) in ALL {
        if wanted.is_empty() || wanted.iter().any(|word| word == name) {
            println!("{name}");
            for line in measure() {
                println!("  {line}");
            }
        }
    }
}
