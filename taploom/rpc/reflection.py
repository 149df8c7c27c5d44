"""placeholder"""


def reflection_services(names):
    return []
