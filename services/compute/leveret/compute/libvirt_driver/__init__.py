"""Real guests: QEMU through libvirt, behind the contract of `leveret.compute.driver`."""

from leveret.compute.libvirt_driver.driver import LibvirtDriver
from leveret.compute.libvirt_driver.settings import LibvirtSettings

__all__ = ["LibvirtDriver", "LibvirtSettings"]
